"""Objects of the official files to flat rows: one row a question that a model answers, its ids kept.

Every function takes an object and where it was read, and yields flat rows; it raises DataError, with that place,
for a part that is missing or of the wrong kind. A label that is not there stays away: test files have none.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

from plugbridge.errors import DataError

Unfolding = Literal["multirc", "record", "wsc", "diagnostic", "mrpc"]
Raw = Mapping[str, Any]
T = TypeVar("T")


def multirc(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """One row an answer: paragraph, question, answer; idx is the answer's."""
    passage = _part(raw, "passage", dict, where)
    paragraph = _part(passage, "text", str, where)
    for question in _objects(passage, "questions", where):
        ids = {"paragraph_idx": _part(raw, "idx", int, where), "question_idx": _part(question, "idx", int, where)}
        text = _part(question, "question", str, where)
        for answer in _objects(question, "answers", where):
            row = {"paragraph": paragraph, "question": text, "answer": _part(answer, "text", str, where)}
            yield {**row, **ids, "idx": _part(answer, "idx", int, where), **_kept(answer, "label")}


def record(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """One row a query: the entities, each once, in the passage's order; the accepted answers' texts, each once.

    The bullet points below an article ("@highlight") become sentences of the passage, as Raffel et al. 2020 read them.
    """
    passage = _part(raw, "passage", dict, where)
    text = _part(passage, "text", str, where)
    found = [text[_part(e, "start", int, where) : _part(e, "end", int, where) + 1] for e in
             _objects(passage, "entities", where)]  # fmt: skip
    entities = list(dict.fromkeys(entity.strip() for entity in found if entity.strip()))
    shared = {"passage": without_bullets(text), "entities": entities, "entity_list": ", ".join(entities)}
    for query in _objects(raw, "qas", where):
        row: dict[str, Any] = {
            **shared, "query": _part(query, "query", str, where), "idx": _part(query, "idx", int, where),
            "passage_idx": _part(raw, "idx", int, where),
        }  # fmt: skip
        if "answers" in query:
            texts = [_part(answer, "text", str, where).strip() for answer in _objects(query, "answers", where)]
            row["answers"] = list(dict.fromkeys(texts))
        yield row


def without_bullets(text: str) -> str:
    """An article's bullet points as sentences of its text."""
    text = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text)
    return text.replace("\n@highlight\n", ". ")


def wsc(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """The text with the pronoun between stars as `marked` (Raffel et al. 2020, D.13), and both spans."""
    target = _part(raw, "target", dict, where)
    pronoun = _part(target, "span2_text", str, where)
    words = _part(raw, "text", str, where).split()
    at = _nearest(words, pronoun, _part(target, "span2_index", int, where), where)
    marked = [*words[:at], words[at].replace(pronoun, f"*{pronoun}*", 1), *words[at + 1 :]]
    spans = {"span1_text": _part(target, "span1_text", str, where), "span2_text": pronoun}
    yield {"text": raw["text"], "marked": " ".join(marked), **spans, **_kept(raw, "idx", "label")}


def _nearest(words: list[str], word: str, index: int, where: str) -> int:
    """The position nearest to `index` that holds `word`: some official rows count one word too few."""
    found = [i for i, text in enumerate(words) if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    if not found:
        raise DataError(f"{where}: the text does not hold span2_text '{word}'; expected it at word {index}")
    return min(found, key=lambda i: abs(i - index))


def diagnostic(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """AX-b's two sentences under RTE's names; a row that has those already stays as it is."""
    if "sentence1" not in raw:
        yield dict(raw)
        return
    names = {"sentence1": "premise", "sentence2": "hypothesis"}
    yield {names.get(name, name): value for name, value in raw.items()}


def mrpc(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """The corpus's columns under GLUE's names."""
    yield {"label": raw["Quality"], "sentence1": raw["#1 String"], "sentence2": raw["#2 String"]}


UNFOLD: dict[Unfolding, Callable[[Raw, str], Iterator[dict[str, Any]]]] = {
    "multirc": multirc,
    "record": record,
    "wsc": wsc,
    "diagnostic": diagnostic,
    "mrpc": mrpc,
}


def _part(raw: Raw, name: str, kind: type[T], where: str) -> T:
    if name not in raw:
        raise DataError(f"{where}: '{name}' is missing; found {', '.join(sorted(raw)) or 'nothing'}")
    value = raw[name]
    if not isinstance(value, kind):
        raise DataError(f"{where}: '{name}' is {type(value).__name__}; expected {kind.__name__}")
    return value


def _objects(raw: Raw, name: str, where: str) -> list[dict[str, Any]]:
    values = cast(list[Any], _part(raw, name, list, where))
    for value in values:
        if not isinstance(value, dict):
            raise DataError(f"{where}: '{name}' holds {type(value).__name__}; expected objects")
    return values


def _kept(raw: Raw, *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in names if name in raw}
