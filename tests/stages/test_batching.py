"""All eight tasks of SuperGLUE on the embedded models: neither padding nor batching changes an answer."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from plugbridge.config import parse_config
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.stages.work import answers_of

PAIRS = Path(__file__).parent.parent.parent / "pairs"
Raw = dict[str, Any]
WORDS = ["the", "a", "dog", "house", "river", "old", "small", "ran", "fell", "over", "because", "apple", "slowly"]


def text(chosen: random.Random, most: int = 30) -> str:
    return " ".join(chosen.choices(WORDS, k=chosen.randint(2, most)))


def phrases(chosen: random.Random) -> tuple[str, list[Raw]]:
    """A text and the character spans of three of its phrases."""
    words = [*text(chosen).split(), "the", "old", "house"]
    whole = " ".join(words)
    at = [len(" ".join(words[:k])) + (k > 0) for k in range(len(words))]
    places = sorted(chosen.sample(range(len(words)), 3))
    return whole, [{"start": at[k], "end": at[k] + len(words[k]) - 1} for k in places]


def multirc(chosen: random.Random, i: int) -> Raw:
    answers = [{"text": text(chosen, 5), "idx": 3 * i + a, "label": a % 2} for a in range(3)]
    question = {"question": text(chosen, 8), "idx": i, "answers": answers}
    return {"idx": i, "passage": {"text": text(chosen), "questions": [question]}}


def record(chosen: random.Random, i: int) -> Raw:
    whole, entities = phrases(chosen)
    first = entities[0]
    answer = {**first, "text": whole[first["start"] : first["end"] + 1]}
    query = {"query": f"{text(chosen, 6)} @placeholder", "idx": i, "answers": [answer]}
    return {"idx": i, "passage": {"text": whole, "entities": entities}, "qas": [query]}


def wsc(chosen: random.Random, i: int) -> Raw:
    words = [*text(chosen).split(), "it"]
    target = {"span1_text": words[0], "span1_index": 0, "span2_text": "it", "span2_index": len(words) - 1}
    return {"text": " ".join(words), "idx": i, "label": i % 2 == 0, "target": target}


def wic(chosen: random.Random, i: int) -> Raw:
    spans = {"start1": 0, "end1": 3, "start2": 0, "end2": 3}
    return {"word": "dog", "sentence1": text(chosen), "sentence2": text(chosen), "label": i % 2 == 0, "idx": i, **spans}


def copa(chosen: random.Random, i: int) -> Raw:
    choices = {"choice1": text(chosen, 6), "choice2": text(chosen, 9)}
    return {"premise": text(chosen), **choices, "question": ("cause", "effect")[i % 2], "label": i % 2, "idx": i}


def pair(labels: tuple[str, ...]) -> Callable[[random.Random, int], Raw]:
    return lambda chosen, i: {
        "premise": text(chosen), "hypothesis": text(chosen, 8), "label": labels[i % len(labels)], "idx": i
    }  # fmt: skip


TASKS: dict[str, tuple[str, Callable[[random.Random, int], Raw]]] = {
    "boolq": ("BoolQ", lambda c, i: {"passage": text(c), "question": text(c, 6), "label": i % 2 == 0, "idx": i}),
    "cb": ("CB", pair(("entailment", "contradiction", "neutral"))),
    "copa": ("COPA", copa),
    "multirc": ("MultiRC", multirc),
    "rte": ("RTE", pair(("entailment", "not_entailment"))),
    "wic": ("WiC", wic),
    "wsc": ("WSC", wsc),
    "record": ("ReCoRD", record),
}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, family) for name in ("multirc", "record", "wsc") for family in ("gpt2", "t5")),
        ("boolq", "gpt2"), ("cb", "t5"), ("copa", "gpt2"), ("rte", "t5"), ("wic", "gpt2"),
    ],
)  # fmt: skip
def test_padding_and_batching_change_no_answer(name: str, family: str, tmp_path: Path) -> None:
    folder, make = TASKS[name]
    chosen = random.Random(name)
    for file, count in (("train", 12), ("val", 9)):
        path = tmp_path / "data" / folder / f"{file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [make(chosen, i) for i in range(count)])
    model = str(PAIRS / family / "small")
    raw = {"small": model, "large": str(PAIRS / family / "large"), "task": name, "prune": {"reduction": 2}}
    found: list[list[tuple[str, str]]] = []
    scores: list[list[float]] = []
    prepared = prepare(parse_config(raw, "test"), tmp_path / "data")
    loaded, _ = prepared.load(model)
    for size in (1, 4, 64):
        p = replace(prepared, config=parse_config({**raw, "evaluate": {"batch_size": size}}, "test"))
        answers = answers_of(p, loaded, p.encoder, p.rows["test"], Silent(), "")
        found.append([(answer.row.where, answer.text) for answer in answers])
        assert [answer.row.where for answer in answers] == [row.row.where for row in p.rows["test"] if row.row]
        scores.append([score for answer in answers for score in answer.scores])
    assert len({len(row.prompt) for row in prepared.rows["test"]}) > 3  # there is something to pad
    assert found[0] == found[1] == found[2]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert scores[2] == pytest.approx(scores[0], abs=1e-4)
