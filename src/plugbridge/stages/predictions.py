"""What a model answered, row by row, for a reader: `evaluate/predictions/*.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugbridge.files import write_atomically
from plugbridge.tasks.form import PromptForm, field_of, template_fields, template_of, text_of
from plugbridge.tasks.metrics import NONE, Answer, is_right
from plugbridge.tasks.read import read_jsonl
from plugbridge.tasks.rows import Row, texts_of
from plugbridge.tasks.spec import Task

BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
"""What some readers take for a line's end, and JSON for a letter, as JSON escapes it."""
SHOWN = 2_000
"""Characters of a prompt that are shown at most, its beginning and its end."""


def write_predictions(path: Path, task: Task, form: PromptForm, answers: Sequence[Answer]) -> None:
    """A line an answer, in UTF-8, and no line break but those between answers, whoever splits lines."""
    lines = (json.dumps(line_of(task, form, a), ensure_ascii=False).translate(BREAKS) + "\n" for a in answers)
    with write_atomically(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def line_of(task: Task, form: PromptForm, answer: Answer) -> dict[str, Any]:
    """An answer by names.

    `id` is the row's own, or its file and line, `text` the row's field that the prompt reads, or its fields by name,
    and `prompt` what the model read. `prediction` and `right` are labels, or texts as the row has them, no template
    around them; of several right answers, which are all in `accepted`, `right` is the one that was given; `correct` is
    whether it was. `scores` are what the choice was made on, by label or option. Where a text was judged, or options
    are filled in, they are shown.
    """
    row = answer.row
    names = _names(task, form, row)
    right = [names[i] for i in (row.answer, *row.also)]
    prediction = answer.text if answer.choice == NONE else names[answer.choice]
    found: dict[str, Any] = {
        "id": row.where if task.id is None else row.fields[task.id],
        "text": _text(form, row),
        "prediction": prediction,
        "right": prediction if is_right(answer) else right[0],
        "correct": is_right(answer),
    }
    if len(right) > 1 or (form.generate is not None and form.judge is None):
        found["accepted"] = right
    if form.judge is not None:
        found["written"] = answer.text
    if form.options is not None:
        found["options"] = list(row.options)
    if answer.scores:
        found["scores"] = dict(zip(names, answer.scores, strict=True))
    return {**found, "prompt": shortened(row.prompt)}


def right_rows(path: Path) -> list[bool]:
    """Which rows a file of answers has right, in its order; earlier versions wrote no `correct`.

    Raises DataError, and KeyError for a file of other lines.
    """
    lines = (line for _, line in read_jsonl(path))
    return [bool(line["correct"]) if "correct" in line else line["prediction"] == line["right"] for line in lines]


def _text(form: PromptForm, row: Row) -> str | dict[str, str]:
    """What a row's prompt says of it: a text where its template has one field, else texts by field."""
    names = dict.fromkeys(template_fields(template_of(form, row.fields, row.where)))
    texts = {name: shortened(text_of(field_of(row.fields, name, row.where))) for name in names}
    return next(iter(texts.values())) if len(texts) == 1 else texts


def _names(task: Task, form: PromptForm, row: Row) -> list[str]:
    """What a row's options are called: labels, numbers, or the texts that the row lists."""
    if form.words is not None:
        return list(form.words)
    if form.options is not None:
        return [str(i) for i in range(len(row.options))]
    listed = texts_of(row.fields, form.options_from or task.label, row.where) if row.options else ()
    return list(listed)


def shortened(text: str) -> str:
    """A text without its middle where it is long."""
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
