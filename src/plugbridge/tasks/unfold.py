"""Objects of the official files to flat rows: one row a question that a model answers, its ids kept.

Every function takes an object and where it was read, and yields flat rows; it raises DataError, with that place,
for a part that is missing or of the wrong kind. A label that is not there stays away: test files have none.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from plugbridge.errors import DataError
from plugbridge.parsing import one_line, shown

Unfolding = Literal["multirc", "record", "wsc", "diagnostic", "mrpc"]
Raw = Mapping[str, Any]
T = TypeVar("T")


def multirc(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """One row an answer: paragraph, question, answer; idx is the answer's."""
    passage = part(raw, "passage", dict, where)
    paragraph, paragraph_idx = part(passage, "text", str, where), part(raw, "idx", int, where)
    seen: set[int] = set()
    for question in _objects(passage, "questions", where):
        text, idx = part(question, "question", str, where), part(question, "idx", int, where)
        if idx in seen:
            raise DataError(f"{where}: two questions have idx {idx}; every question of a paragraph needs its own")
        seen.add(idx)
        ids = {"paragraph_idx": paragraph_idx, "question_idx": idx}
        for answer in _objects(question, "answers", where):
            row = {"paragraph": paragraph, "question": text, "answer": part(answer, "text", str, where)}
            yield {**row, **ids, "idx": part(answer, "idx", int, where), **_kept(answer, "label")}


def record(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """One row a query: the entities' and the accepted answers' texts, each once and sorted, as the hub has them.

    The bullet points below an article ("@highlight") become sentences of the passage, as Raffel et al. 2020 read them.
    """
    passage = part(raw, "passage", dict, where)
    text = part(passage, "text", str, where)
    found = [_span(text, entity, where) for entity in _objects(passage, "entities", where)]
    shared = {**article(text, found), "passage_idx": part(raw, "idx", int, where)}
    for query in _objects(raw, "qas", where):
        row: dict[str, Any] = {**shared, "query": cloze(query, where), "idx": part(query, "idx", int, where)}
        if "answers" in query:
            answers = _objects(query, "answers", where, empty=True)
            row["answers"] = accepted((part(answer, "text", str, where) for answer in answers), row["entities"], where)
        yield row


def _span(text: str, raw: Raw, where: str) -> str:
    """An entity's text; `end` is its last character. Raises DataError for a span that is not within the text."""
    start, end = part(raw, "start", int, where), part(raw, "end", int, where)
    if not 0 <= start <= end < len(text):
        raise DataError(f"{where}: an entity is from {start} to {end}, not within the text's {len(text)} characters")
    return text[start : end + 1]


def article(text: str, entities: Iterable[str]) -> dict[str, Any]:
    """What ReCoRD's rows about one article share: passage, entities, and those as one text."""
    found = [entity for entity in sorted_texts(entities) if entity]
    return {"passage": without_bullets(text), "entities": found, "entity_list": ", ".join(found)}


def accepted(texts: Iterable[str], entities: Sequence[str], where: str) -> list[str]:
    """ReCoRD's answers to a query. Raises DataError for one that is no entity of the article."""
    found = sorted_texts(texts)
    for text in found:
        if text not in entities:
            raise DataError(f"{where}: answer {shown(text)} is none of the article's {len(entities)} entities")
    return found


def cloze(raw: Raw, where: str) -> str:
    """ReCoRD's query. Raises DataError for one without a placeholder."""
    query = part(raw, "query", str, where)
    if "@placeholder" not in query:
        raise DataError(f"{where}: the query has no @placeholder: {shown(query)}")
    return query


def sorted_texts(texts: Iterable[str]) -> list[str]:
    """Texts less the blanks around them, each once, in the order of their code points."""
    return sorted({text.strip() for text in texts})


def without_bullets(text: str) -> str:
    """An article's bullet points as sentences of its text."""
    text = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text)
    return text.replace("\n@highlight\n", ". ")


def wsc(raw: Raw, where: str) -> Iterator[dict[str, Any]]:
    """The text with the pronoun between stars as `marked` (Raffel et al. 2020, D.13), and both spans."""
    target = part(raw, "target", dict, where)
    pronoun = part(target, "span2_text", str, where)
    words = part(raw, "text", str, where).split()
    at = _nearest(words, pronoun, part(target, "span2_index", int, where), where)
    marked = [*words[:at], words[at].replace(pronoun, f"*{pronoun}*", 1), *words[at + 1 :]]
    spans = {"span1_text": part(target, "span1_text", str, where), "span2_text": pronoun}
    yield {"text": raw["text"], "marked": " ".join(marked), **spans, **_kept(raw, "idx", "label")}


def _nearest(words: list[str], word: str, index: int, where: str) -> int:
    """The position nearest to `index` that holds `word`: some official rows count one word too few."""
    found = [i for i, text in enumerate(words) if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    if not found:
        raise DataError(f"{where}: the text does not hold span2_text {shown(word)}; expected it at word {index}")
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

SHARED: dict[Unfolding | None, str] = {"multirc": "paragraph", "record": "article"}  # what one object's rows are about


def part(raw: Raw, name: str, kind: type[T], where: str) -> T:
    """A part of an object. Raises DataError if it is missing or not of the kind."""
    if name not in raw:
        raise DataError(f"{where}: {shown(name)} is missing; found {one_line(', '.join(sorted(raw))) or 'nothing'}")
    value = raw[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: {shown(name)} is {type(value).__name__}; expected {kind.__name__}")
    return value


def _objects(raw: Raw, name: str, where: str, empty: bool = False) -> list[dict[str, Any]]:
    values = cast(list[Any], part(raw, name, list, where))
    if not values and not empty:
        raise DataError(f"{where}: {shown(name)} is an empty list; expected at least one object")
    for value in values:
        if not isinstance(value, dict):
            raise DataError(f"{where}: {shown(name)} holds {type(value).__name__}; expected objects")
    return values


def _kept(raw: Raw, *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in names if name in raw}
