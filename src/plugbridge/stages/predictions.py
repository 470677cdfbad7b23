"""What a model answered, row by row, for a reader: `evaluate/predictions/*.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugbridge.files import write_atomically
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.metrics import NONE, Answer, is_right
from plugbridge.tasks.rows import Row
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

    `id` is the row's own, or its file and line; `prediction` and `right` are labels, a listed option's text, or what
    was written; of several right answers, which are all in `accepted`, `right` is the one that was given. `scores` are
    what the choice was made on, by label or option. Where a text was judged, or options are filled in, they are shown.
    """
    row = answer.row
    names = _names(form, row)
    right = [names[i] for i in (row.answer, *row.also)]
    prediction = answer.text if answer.choice == NONE else names[answer.choice]
    found: dict[str, Any] = {
        "id": row.where if task.id is None else row.fields[task.id],
        "prompt": shortened(row.prompt),
        "prediction": prediction,
        "right": prediction if is_right(answer) else right[0],
    }
    if len(right) > 1 or (form.generate is not None and form.judge is None):
        found["accepted"] = right
    if form.judge is not None:
        found["written"] = answer.text
    if form.options is not None:
        found["options"] = list(row.options)
    if answer.scores:
        found["scores"] = dict(zip(names, answer.scores, strict=True))
    return found


def _names(form: PromptForm, row: Row) -> list[str]:
    """What a row's options are called: labels, numbers, or the options themselves."""
    if form.words is not None:
        return list(form.words)
    return [str(i) for i in range(len(row.options))] if form.options is not None else list(row.options)


def shortened(text: str) -> str:
    """A text without its middle where it is long."""
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
