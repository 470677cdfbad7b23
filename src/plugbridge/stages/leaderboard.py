"""What a leaderboard takes: its test rows, checked before any model is loaded, and the format of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugbridge.errors import ConfigError, DataError
from plugbridge.parsing import shown
from plugbridge.preflight import Checked
from plugbridge.stages.depends import model_names
from plugbridge.stages.recorded import check_recorded
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.metrics import Answer, chosen, written
from plugbridge.tasks.rows import Row, find_files, make_row, read_flat
from plugbridge.tasks.spec import Leaderboard, Task
from plugbridge.transfer.needed import makes


@dataclass(frozen=True)
class Unanswered:
    """A leaderboard's rows, the form that puts them to models, and the file to write."""

    task: Task
    form: PromptForm
    board: Leaderboard
    rows: list[Row]
    path: Path


def read_unanswered(checked: Checked, root: Path, task: Task, model: str, data: Path | None, out: Path) -> Unanswered:
    """The test rows of a task that a finished run can answer.

    The task is the run's own, or one that puts rows to models in the same way (AX-b and AX-g for RTE).
    Raises ConfigError, RunError for a run that is not finished, DataError.
    """
    form, board = task.form(checked.kind), task.leaderboard
    if board is None:
        raise ConfigError(f"task '{task.name}' has no leaderboard; `plugbridge submit` is for the tasks of SuperGLUE")
    if form != checked.task.form(checked.kind):
        raise ConfigError(
            f"the run is of task '{checked.task.name}', which asks otherwise than '{task.name}'; run that task"
        )
    known = [name for name in model_names(checked.config) if makes(checked.config, name)]
    if model not in known:
        raise ConfigError(f"the run has no model {shown(model)}; known: {', '.join(known)}")
    check_recorded(root, checked, "evaluate", redo=True)
    path = find_files(task, data, {"test": board.rows})["test"]
    rows = [make_row(task, form, where, raw, labelled=False) for where, raw in read_flat(task, path)]
    for row in rows:
        number_of(row)
    if (out / board.file).exists():  # in a format that says nothing of who wrote it
        raise ConfigError(f"{out / board.file} is there already; move it away, or choose another --out")
    return Unanswered(task, form, board, rows, out / board.file)


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
