"""Official nested objects as flat rows, by hand; what is missing is refused by file and line."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from plugbridge.errors import DataError
from plugbridge.tasks.rows import read_flat
from plugbridge.tasks.spec import load_task
from plugbridge.tasks.unfold import UNFOLD

MULTIRC: dict[str, Any] = {
    "idx": 6,
    "version": 1.1,
    "passage": {
        "text": "Reb came to town.",
        "questions": [
            {"question": "Who came?", "idx": 12, "answers": [
                {"text": "Reb", "idx": 30, "label": 1}, {"text": "Jason", "idx": 31, "label": 0}]},
            {"question": "Where to?", "idx": 13, "answers": [{"text": "A town", "idx": 32, "label": 1}]},
        ],
    },
}  # fmt: skip
RECORD: dict[str, Any] = {
    "source": "Daily mail",
    "idx": 3,
    "passage": {
        "text": "Olimpija beat Costa.\n@highlight\nCosta scored\n@highlight\nZouma too",
        "entities": [
            {"start": 0, "end": 7}, {"start": 14, "end": 18}, {"start": 32, "end": 36}, {"start": 56, "end": 60},
        ],
    },
    "qas": [
        {"query": "@placeholder won.", "idx": 40, "answers": [
            {"start": 0, "end": 7, "text": "Olimpija"}, {"start": 0, "end": 7, "text": "Olimpija"}]},
        {"query": "@placeholder lost.", "idx": 41, "answers": [
            {"start": 56, "end": 60, "text": "Zouma"}, {"start": 14, "end": 18, "text": "Costa"}]},
    ],
}  # fmt: skip
WSC: dict[str, Any] = {
    "text": "Mark told Pete many lies, which \"he, himself\" believed.",
    "target": {"span1_text": "Pete", "span1_index": 2, "span2_text": "he", "span2_index": 6},
    "idx": 5,
    "label": True,
}  # fmt: skip


def unfolded(name: Any, raw: Any) -> list[dict[str, Any]]:
    return list(UNFOLD[name](raw, "here"))


def test_multirc_is_one_row_an_answer() -> None:
    shared = {"paragraph": "Reb came to town.", "paragraph_idx": 6}
    who, where = {"question": "Who came?", "question_idx": 12}, {"question": "Where to?", "question_idx": 13}
    assert unfolded("multirc", MULTIRC) == [
        {**shared, **who, "answer": "Reb", "idx": 30, "label": 1},
        {**shared, **who, "answer": "Jason", "idx": 31, "label": 0},
        {**shared, **where, "answer": "A town", "idx": 32, "label": 1},
    ]


def test_record_is_one_row_a_query_and_its_lists_are_sorted() -> None:
    shared = {
        "passage": "Olimpija beat Costa. Costa scored. Zouma too", "entities": ["Costa", "Olimpija", "Zouma"],
        "entity_list": "Costa, Olimpija, Zouma", "passage_idx": 3,
    }  # fmt: skip
    rows = unfolded("record", RECORD)
    assert rows == [
        {**shared, "query": "@placeholder won.", "idx": 40, "answers": ["Olimpija"]},
        {**shared, "query": "@placeholder lost.", "idx": 41, "answers": ["Costa", "Zouma"]},
    ]
    assert rows[0]["passage"] is rows[1]["passage"]  # a passage is in memory once, however many ask about it


def test_wsc_marks_the_pronoun() -> None:
    [row] = unfolded("wsc", WSC)
    assert row == {
        "text": WSC["text"], "marked": 'Mark told Pete many lies, which "*he*, himself" believed.',
        "span1_text": "Pete", "span2_text": "he", "idx": 5, "label": True,
    }  # fmt: skip


@pytest.mark.parametrize(("index", "at"), [(0, 0), (2, 2), (3, 2), (5, 5), (9, 5)])
def test_a_pronoun_counted_wrongly_is_found_nearby(index: int, at: int) -> None:
    raw = {
        "text": "it the it that bit it .",
        "target": {"span1_text": "that", "span2_text": "it", "span2_index": index},
    }
    [row] = unfolded("wsc", raw)
    assert [i for i, word in enumerate(row["marked"].split()) if word == "*it*"] == [at]


def test_diagnostic_rows_take_rtes_names() -> None:
    row = {"idx": "0", "label": "entailment", "sentence1": "a", "sentence2": "b", "logic": "Negation"}
    named = {"idx": "0", "label": "entailment", "premise": "a", "hypothesis": "b", "logic": "Negation"}
    assert unfolded("diagnostic", row) == [named]
    assert unfolded("diagnostic", named) == [named]


def without(raw: dict[str, Any], *path: Any, put: Any = None) -> dict[str, Any]:
    """A copy less the part at the path, or with another in its place."""
    found = copy.deepcopy(raw)
    inner: Any = found
    for part in path[:-1]:
        inner = inner[part]
    if put is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = put
    return found


def test_test_rows_have_no_label() -> None:
    [row] = unfolded("wsc", without(WSC, "label"))
    assert "label" not in row
    rows = unfolded("multirc", without(MULTIRC, "passage", "questions", 0, "answers", 0, "label"))
    assert ["label" in row for row in rows] == [False, True, True]
    assert "answers" not in unfolded("record", without(RECORD, "qas", 0, "answers"))[0]


@pytest.mark.parametrize(
    ("task", "raw", "message"),
    [
        ("multirc", without(MULTIRC, "passage"), "'passage' is missing; found idx, version"),
        ("multirc", without(MULTIRC, "passage", "text"), "'text' is missing; found questions"),
        ("multirc", without(MULTIRC, "passage", put="Reb."), "'passage' is str; expected dict"),
        ("multirc", without(MULTIRC, "passage", "questions", put=["Who?"]), "'questions' holds str; expected objects"),
        ("multirc", without(MULTIRC, "passage", "questions", 1, "idx"), "'idx' is missing; found answers, question"),
        ("multirc", without(MULTIRC, "passage", "questions", 0, "answers", 0, "idx", put="a"), "'idx' is str; exp"),
        ("record", without(RECORD, "qas"), "'qas' is missing; found idx, passage, source"),
        ("record", without(RECORD, "passage", "entities", 0, "end"), "'end' is missing; found start"),
        ("record", without(RECORD, "qas", 0, "query"), "'query' is missing; found answers, idx"),
        ("wsc", without(WSC, "target"), "'target' is missing; found idx, label, text"),
        ("wsc", without(WSC, "target", "span2_text"), "'span2_text' is missing"),
        ("wsc", without(WSC, "target", "span2_text", put="she"), "the text does not hold span2_text 'she'; "),
        ("wsc", without(WSC, "idx"), "field 'idx' is missing; the row has label, marked"),
        ("multirc", without(MULTIRC, "idx", put=True), "idx is true; expected a whole number or a text"),
        ("multirc", without(MULTIRC, "passage", "questions", 1, "idx", put=True), "'idx' is bool; expected int"),
        ("multirc", without(MULTIRC, "passage", "questions", 1, "answers", 0, "idx", put=30), "idx 30 was that of "),
        ("multirc", without(MULTIRC, "passage", "questions", 1, "idx", put=12),
         "two questions have idx 12; every question of a paragraph needs its own"),
        ("multirc", without(MULTIRC, "passage", "questions", put=[]), "'questions' is an empty list; expected"),
        ("multirc", without(MULTIRC, "passage", "questions", 1, "answers", put=[]), "'answers' is an empty list; exp"),
        ("record", without(RECORD, "qas", put=[]), "'qas' is an empty list; expected at least one object"),
        ("record", without(RECORD, "passage", "entities", put=[]), "'entities' is an empty list; expected at least"),
        ("record", without(RECORD, "passage", "entities", 3, "end", put=65),
         "an entity is from 56 to 65, not within the text's 65 characters"),
        ("record", without(RECORD, "passage", "entities", 0, "start", put=-8), "an entity is from -8 to 7, not within"),
        ("record", without(RECORD, "passage", "entities", 0, "start", put=8), "an entity is from 8 to 7, not within"),
        ("record", without(RECORD, "qas", 1, "query", put="Costa lost."),
         "the query has no @placeholder: 'Costa lost.'"),
        ("record", without(RECORD, "qas", 1, "answers", 0, "text", put="Ajax"),
         "answer 'Ajax' is none of the article's 3 entities"),
        ("record", without(RECORD, "qas", 1, "idx", put=40), "idx 40 was that of "),
    ],
)  # fmt: skip
def test_bad_objects_are_refused_by_file_and_line(tmp_path: Path, task: str, raw: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n", encoding="utf-8")
    write_jsonl(tmp_path / "more.jsonl", [raw])
    path.write_text("\n" + (tmp_path / "more.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:2: {message}')}"):
        list(read_flat(load_task(task), path))


def test_an_entity_may_end_with_the_text() -> None:
    raw = without(RECORD, "qas", put=RECORD["qas"][:1])
    raw = without(raw, "passage", "entities", 3, put={"start": 62, "end": 64})
    assert unfolded("record", raw)[0]["entities"] == ["Costa", "Olimpija", "too"]


def test_two_paragraphs_of_one_idx_are_refused_by_file_and_line(tmp_path: Path) -> None:
    other = without(MULTIRC, "passage", "questions", put=[
        {"question": "Why?", "idx": 14, "answers": [{"text": "No idea", "idx": 33, "label": 0}]}
    ])  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", [MULTIRC, {**other, "idx": 7}, other])
    message = f"{path}:3: idx 6 was that of {path}:1 already; every paragraph needs its own"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(read_flat(load_task("multirc"), path))


def test_two_articles_of_one_idx_are_refused_by_file_and_line(tmp_path: Path) -> None:
    other = without(RECORD, "qas", put=[{**RECORD["qas"][0], "idx": 42}])
    path = write_jsonl(tmp_path / "rows.jsonl", [RECORD, {**other, "idx": 7}, without(other, "qas", 0, "idx", put=43)])
    message = f"{path}:3: idx 3 was that of {path}:1 already; every article needs its own"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(read_flat(load_task("record"), path))


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "rte", "wic", "ax-b", "ax-g"])
def test_duplicate_ids_are_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"idx": 0}, {"idx": 1}, {"idx": 0}])
    message = f"{path}:3: idx 0 was that of {path}:1 already; every row needs its own"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        list(read_flat(load_task(name), path))
    write_jsonl(path, [{"idx": 0}, {"label": 1}])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: field 'idx' is missing; the row has label$"):
        list(read_flat(load_task(name), path))


@pytest.mark.parametrize("idx", ["null", "true", "0.5", "1.0", '" "', "[1]", "{}"])
def test_what_is_no_id_is_refused_by_file_and_line(tmp_path: Path, idx: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"idx": "a0"}}\n{{"idx": {idx}}}\n', encoding="utf-8")
    message = f"{path}:2: idx is {idx}; expected a whole number or a text"
    for name in ("rte", "ax-b"):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            list(read_flat(load_task(name), path))
