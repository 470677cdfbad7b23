"""Predictions' files: what a reader finds in a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from plugbridge.stages.predictions import SHOWN, line_of, write_predictions
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.metrics import Answer, chosen, written
from plugbridge.tasks.rows import Row
from plugbridge.tasks.spec import Task, parse_task

WORDS = PromptForm(prompt="{x}", words={"World": " world", "Sports": " sport"})
PICK = PromptForm(prompt="{x}", options_from="o", option=" {option}")
TWO = PromptForm(prompt="{x}", options=(" {a}", " {b}"))
WRITE = PromptForm(prompt="{x}", generate=" {y}")
JUDGED = PromptForm(prompt="{x}", words={"false": "F", "true": "T"}, generate="{y}", judge="referent")


def task_of(form: PromptForm, **more: Any) -> Task:
    raw = {
        "name": "t", "title": "t", "source": "s", "licence": "l", "folder": "", "files": {}, "label": "y",
        "metrics": ["accuracy"], "causal": form.model_dump(), **more,
    }  # fmt: skip
    return parse_task(raw, "test")


def row(options: tuple[str, ...], answer: int, also: tuple[int, ...] = (), target: str | None = None) -> Row:
    fields = {"n": 17, "x": "“x”", "o": ["a", "b", "c"], "y": [option.strip() for option in options]}
    return Row("Über: “x”", options, answer, fields, "rows.jsonl:3", also, target)


@pytest.mark.parametrize(
    ("form", "answer", "wanted"),
    [
        (WORDS, chosen(row((" world", " sport"), 0), 1, (-2.5, -0.5)),
         {"prediction": "Sports", "right": "World", "scores": {"World": -2.5, "Sports": -0.5}}),
        (WORDS, chosen(row((" world", " sport"), 0), 0), {"prediction": "World", "right": "World"}),  # of a probe
        (PICK, chosen(row((" a", " b", " c"), 2, (1,)), 1, (-3.0, -1.0, -2.0)),
         {"prediction": "b", "right": "b", "accepted": ["c", "b"], "scores": {"a": -3.0, "b": -1.0, "c": -2.0}}),
        (TWO, chosen(row((" p", " q"), 0), 1, (-3.0, -1.0)),
         {"prediction": "1", "right": "0", "options": [" p", " q"], "scores": {"0": -3.0, "1": -1.0}}),
        (WRITE, written(WRITE, row((" p", " q"), 0, (1,)), "q"),
         {"prediction": "q", "right": "q", "accepted": ["p", "q"]}),
        (WRITE, written(WRITE, row((" p",), 0), "P!"), {"prediction": "P!", "right": "p", "accepted": ["p"]}),
        (JUDGED, written(JUDGED, row(("F", "T"), 1, (), "the dog"), "dog"),
         {"prediction": "true", "right": "true", "written": "dog"}),
    ],
)  # fmt: skip
def test_a_line_by_names(form: PromptForm, answer: Answer, wanted: dict[str, Any]) -> None:
    wanted["correct"] = wanted["prediction"] == wanted["right"]
    found = line_of(task_of(form), form, answer)
    assert found == {"id": "rows.jsonl:3", "text": "“x”", **wanted, "prompt": "Über: “x”"}
    assert list(found)[:5] == ["id", "text", "prediction", "right", "correct"]
    assert line_of(task_of(form, id="n"), form, answer)["id"] == 17


def test_a_row_of_several_fields_is_shown_by_field() -> None:
    form = PromptForm(prompt="{a} | {b} | {a}:", words={"x": "X", "y": "Y"})
    answer = chosen(Row("one | 2 | one:", ("X", "Y"), 0, {"a": "one", "b": 2, "c": "not shown"}, "r:1"), 1)
    assert line_of(task_of(form), form, answer)["text"] == {"a": "one", "b": "2"}


def test_a_file_is_read_by_eye_and_bounded(tmp_path: Path) -> None:
    text = "这" + "x" * 10**6 + "是"
    long = Row(text, (" world", " sport"), 0, {"x": text}, "a:1")
    write_predictions(tmp_path / "p.jsonl", task_of(WORDS), WORDS, [chosen(long, 0)] * 2)
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert "这" in lines[0]
    shown = json.loads(lines[0])["prompt"]
    assert shown.startswith("这x")
    assert shown.endswith("x是")
    assert "[…998,002 characters…]" in shown
    assert len(shown) < SHOWN + 40
    assert json.loads(lines[0])["text"] == shown


def test_an_answer_is_a_line_whatever_is_in_it(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\nfive\r\x0bsix\ud800"
    answer = chosen(Row(text, (" w", " s"), 0, {"x": text}, "a:1"), 0)
    write_predictions(tmp_path / "p.jsonl", task_of(WORDS), WORDS, [answer] * 3)
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [text] * 3
