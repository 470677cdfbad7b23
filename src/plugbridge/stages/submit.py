"""A finished run's answers to the unlabelled test rows, in the format of SuperGLUE's leaderboard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plugbridge.cost import Cost
from plugbridge.files import write_text
from plugbridge.prepare import Prepared
from plugbridge.progress import Progress
from plugbridge.run import check_needs
from plugbridge.stages.build import build_stages
from plugbridge.stages.evaluate import candidates
from plugbridge.stages.leaderboard import Unanswered, board_lines, uninformed
from plugbridge.stages.work import Work, answers_of
from plugbridge.tasks.encode import Encoded, Encoder, TooLong
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row
from plugbridge.tasks.spec import Task


@dataclass(frozen=True)
class Submitted:
    """The leaderboard's file, its number of rows, and why some of them were not put to the model."""

    path: Path
    rows: int
    long: tuple[str, ...]
    instead: str
    """What the rows that are too long were answered with."""


def submit(p: Prepared, root: Path, asked: Unanswered, model: str, progress: Progress) -> Submitted:
    """Write the leaderboard's file of a task. It takes every row, so a row too long for the model is in it too.

    Raises RunError for a run that is not finished, TooLong if no row fits.
    """
    check_needs(root, build_stages(p, root, progress), "evaluate")
    candidate = next(c for c in candidates(Work(p, root, root / "evaluate", progress, Cost())) if c.name == model)
    task, form, board, rows = asked.task, asked.form, asked.board, asked.rows
    encoded, long = _those_that_fit(candidate.encoder, task, form, rows)
    title = f"submit {board.file}"
    given = iter(
        answers_of(replace(p, task=task), candidate.load(), candidate.encoder, list(encoded.values()), progress, title)
    )
    answers = [next(given) if i in encoded else uninformed(form, row) for i, row in enumerate(rows)]
    lines = board_lines(board, form, answers)
    write_text(asked.path, "".join(json.dumps(line) + "\n" for line in lines))
    instead = "the first option" if form.generate is None else "an empty text"
    return Submitted(asked.path, len(rows), tuple(map(str, long)), instead)


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
