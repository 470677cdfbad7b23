"""A finished run's answers to the unlabelled test rows, in the format of SuperGLUE's leaderboard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plugbridge.cost import Cost
from plugbridge.errors import ConfigError, DataError
from plugbridge.files import write_text
from plugbridge.parsing import shown
from plugbridge.prepare import Prepared
from plugbridge.progress import Progress
from plugbridge.run import check_needs
from plugbridge.stages.build import build_stages
from plugbridge.stages.evaluate import candidates
from plugbridge.stages.work import Work, answers_of
from plugbridge.tasks.encode import Encoded, Encoder, TooLong
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.metrics import Answer, chosen, written
from plugbridge.tasks.rows import Row, find_files, make_row, read_flat
from plugbridge.tasks.spec import Leaderboard, Task
from plugbridge.transfer.needed import makes


@dataclass(frozen=True)
class Submitted:
    """The leaderboard's file, its number of rows, and why some of them were not put to the model."""

    path: Path
    rows: int
    long: tuple[str, ...]
    instead: str
    """What the rows that are too long were answered with."""


def submit(
    p: Prepared, root: Path, task: Task, model: str, data: Path | None, out: Path, progress: Progress
) -> Submitted:
    """Write the leaderboard's file of a task. It takes every row, so a row too long for the model is in it too.

    The task is the run's own, or one that puts rows to models in the same way (AX-b and AX-g for RTE).
    Raises ConfigError, RunError for a run that is not finished, DataError.
    """
    kind = p.encoder.kind
    form, board = task.form(kind), task.leaderboard
    if board is None:
        raise ConfigError(f"task '{task.name}' has no leaderboard; `plugbridge submit` is for the tasks of SuperGLUE")
    if form != p.task.form(kind):
        raise ConfigError(f"the run is of task '{p.task.name}', which asks otherwise than '{task.name}'; run that task")
    every = candidates(Work(p, root, root / "evaluate", progress, Cost()))
    found = {candidate.name: candidate for candidate in every if makes(p.config, candidate.name)}
    if model not in found:
        raise ConfigError(f"the run has no model {shown(model)}; known: {', '.join(found)}")
    check_needs(root, build_stages(p, root, progress), "evaluate")
    path = find_files(task, data, {"test": board.rows})["test"]
    encoder = found[model].encoder
    rows = [make_row(task, form, where, raw, labelled=False) for where, raw in read_flat(task, path)]
    for row in rows:
        number_of(row)
    encoded, long = _those_that_fit(encoder, task, form, rows)
    if (out / board.file).exists():  # in a format that says nothing of who wrote it
        raise ConfigError(f"{out / board.file} is there already; move it away, or choose another --out")
    loaded = found[model].load()
    title = f"submit {board.file}"
    given = iter(answers_of(replace(p, task=task), loaded, encoder, list(encoded.values()), progress, title))
    answers = [next(given) if i in encoded else uninformed(form, row) for i, row in enumerate(rows)]
    lines = board_lines(board, form, answers)
    write_text(out / board.file, "".join(json.dumps(line) + "\n" for line in lines))
    instead = "the first option" if form.generate is None else "an empty text"
    return Submitted(out / board.file, len(rows), tuple(map(str, long)), instead)


def _those_that_fit(
    encoder: Encoder, task: Task, form: PromptForm, rows: Sequence[Row]
) -> tuple[dict[int, Encoded], list[TooLong]]:
    """Rows in tokens by position, and why the others are too long. Raises TooLong if no row fits."""
    found: dict[int, Encoded] = {}
    long: list[TooLong] = []
    for i, row in enumerate(rows):
        try:
            found[i] = encoder.encode(task, form, row)
        except TooLong as error:
            long.append(error)
    if not found and long:
        raise long[0]
    return found, long


def uninformed(form: PromptForm, row: Row) -> Answer:
    """An answer to a row that no model has read: its first option, or an empty text where models write."""
    return chosen(row, 0) if form.generate is None else written(form, row, "")


def number_of(row: Row) -> int:
    """A row's idx, as the leaderboard takes it. Raises DataError for a text that is no number."""
    idx = row.fields["idx"]
    if not isinstance(idx, int) and not (idx.isascii() and idx.isdecimal()):
        raise DataError(f"{row.where}: idx is {shown(idx)}; the leaderboard needs a whole number")
    return int(idx)


def board_lines(board: Leaderboard, form: PromptForm, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The leaderboard's lines, in the answers' order."""
    if board.shape == "questions":
        return _by_question(board, form, answers)
    return [{"idx": number_of(answer.row), "label": _label(board, form, answer)} for answer in answers]


def _label(board: Leaderboard, form: PromptForm, answer: Answer) -> str | int:
    if board.shape == "text":
        return answer.text.strip()
    name = str(answer.choice) if form.words is None else list(form.words)[answer.choice]
    return board.labels.get(name, name)


def _by_question(board: Leaderboard, form: PromptForm, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    paragraphs: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for answer in answers:
        fields = answer.row.fields
        questions = paragraphs.setdefault(fields["paragraph_idx"], {})
        verdict = {"idx": fields["idx"], "label": _label(board, form, answer)}
        questions.setdefault(fields["question_idx"], []).append(verdict)
    return [
        {"idx": idx, "passage": {"questions": [{"idx": q, "answers": found} for q, found in questions.items()]}}
        for idx, questions in paragraphs.items()
    ]
