"""A task as data: where its rows are, how a row becomes a prompt with options, which metrics count.

A shipped task is one TOML file beside this module; the user's own is a jsonl file with a prompt
and label words in the run's configuration. `read.py` has the file formats.
"""

import json
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from plugbridge.errors import ConfigError, DataError, first_problem
from plugbridge.tasks.read import Format, Jsonl, read_rows

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TEST_SEED = 0  # draws test rows whatever the run's seed: all seeds score the same rows, and none has tuned on them


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptForm(_Strict):
    """How rows are put to one kind of model.

    Either `prompt` or `prompts` (chosen by the value of field `prompt_by`). Either `words`
    (label to label word) or `options` (templates; the label is then the right option's number).
    """

    prompt: str | None = None
    prompts: dict[str, str] | None = None
    prompt_by: str | None = None
    words: dict[str, str] | None = None
    options: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "PromptForm":
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either `prompt` or `prompts`")
        if (self.prompts is None) != (self.prompt_by is None):
            raise ValueError("`prompts` and `prompt_by` go together")
        if (self.words is None) == (self.options is None):
            raise ValueError("give either `words` or `options`")
        if self.words is not None:
            for label, word in self.words.items():
                if not word.strip():
                    raise ValueError(f"the label word of '{label}' is empty")
            seen: dict[str, str] = {}
            for label, word in self.words.items():
                if word in seen:
                    raise ValueError(f"labels '{seen[word]}' and '{label}' have the same word '{word}'")
                seen[word] = label
        return self


class Task(_Strict):
    """One task.

    `folder` is looked up in the data directory, then in the folders of it that `within` names;
    or beside this module if `shipped`. `format` says how the `files` are written. `holdout_test`
    is the share of the train rows that becomes the test split where there is no test file;
    `holdout` is the share of the rest that becomes the validation split where there is no
    validation file. `limit` is the most rows a split may have, after holding out. Validation rows,
    and train rows under a limit, are drawn by the run's seed; test rows always by `TEST_SEED`.
    """

    name: str
    title: str
    source: str
    licence: str
    folder: str
    within: tuple[str, ...] = Field(default=(), exclude=True)  # where files lie changes no result
    shipped: bool = False
    files: dict[str, str]
    format: Format = Jsonl()
    holdout: float = Field(default=0.0, ge=0, lt=1)
    holdout_test: float = Field(default=0.0, ge=0, lt=1)
    limit: dict[Split, PositiveInt] = {}
    label: str
    passage: str | None = None
    metrics: tuple[str, ...]
    causal: PromptForm
    seq2seq: PromptForm | None = None

    @model_validator(mode="after")
    def _hold_out_what_no_file_has(self) -> "Task":
        for key, share, split in (
            ("holdout", self.holdout, "validation"),
            ("holdout_test", self.holdout_test, "test"),
        ):
            if share > 0 and split in self.files:
                raise ValueError(f"give either `{key}` or a {split} file")
        return self

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A task that does not use the later keys is dumped, and so digested by its runs, as it was before them."""
        later = {"format": self.format == Jsonl(), "holdout_test": self.holdout_test == 0, "limit": not self.limit}
        return {key: value for key, value in dump(self).items() if not later.get(key, False)}

    def form(self, kind: str) -> PromptForm:
        """The prompt form for ``causal`` or ``seq2seq`` models."""
        return self.seq2seq if kind == "seq2seq" and self.seq2seq is not None else self.causal


@dataclass(frozen=True)
class Row:
    """One question: text, options, the right option's position, and where it was read."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    fields: Mapping[str, Any]
    where: str


def task_names() -> list[str]:
    """Names of all shipped tasks, sorted."""
    root = files("plugbridge.tasks")
    return sorted(p.name.removesuffix(".toml") for p in root.iterdir() if p.name.endswith(".toml"))


@cache
def load_task(name: str) -> Task:
    """Read ``tasks/<name>.toml``. Raises ConfigError."""
    path = files("plugbridge.tasks") / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(
            f"no task '{name}'; known: {', '.join(task_names())}; your own rows go in a table under `task:`"
        )
    return parse_task(tomllib.loads(path.read_text(encoding="utf-8")), f"{name}.toml")


def parse_task(raw: Mapping[str, Any], source: str) -> Task:
    """Check a task's data. Raises ConfigError that names source and key."""
    try:
        return Task.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_problem(error, source)) from error


def template_fields(template: str) -> list[str]:
    """Field names that a ``{field}`` template uses. Raises ConfigError for a broken template."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"prompt template {template!r} is not usable: {error}") from error
    if any(not str(name).isidentifier() or spec or conversion for _, name, spec, conversion in parts):
        raise ConfigError(f"prompt template {template!r} must use plain {{field}} names")
    return [str(name) for _, name, _, _ in parts]


def split_files(task: Task, data: Path | None) -> dict[str, Path]:
    """Paths of a task's files. Raises DataError naming what was looked for."""
    if task.shipped:
        roots = [Path(str(files("plugbridge.tasks"))) / "data" / task.folder]
    elif data is None:
        raise DataError(
            f"task '{task.name}' needs its files; give --data DIR or set PLUGBRIDGE_DATA to a "
            f"directory that holds {task.folder}/{task.files['train']}"
        )
    else:
        roots = [data / task.folder, *(data / name / task.folder for name in task.within), data]
    for root in roots:
        paths = {split: root / name for split, name in task.files.items()}
        if all(path.is_file() for path in paths.values()):
            return paths
    wanted = ", ".join(task.files.values())
    others = "".join(f", nor does {root}" for root in roots[1:])
    raise DataError(f"task '{task.name}': {roots[0]} does not hold {wanted}{others}")


def load_rows(task: Task, kind: str, data: Path | None, seed: int) -> dict[Split, list[Row]]:
    """All rows of a task, by split; what is held out and what is left out is said at `Task`.

    SuperGLUE's and GLUE's test labels are not public, so their validation file is the test split
    here and no choice may be made on it: the validation split is held out from the train rows.
    Raises DataError.
    """
    paths = split_files(task, data)
    form = task.form(kind)
    rows: dict[Split, list[Row]] = {}
    for split in SPLITS:
        if split in paths:
            rows[split] = [make_row(task, form, where, raw) for where, raw in read_rows(paths[split], task.format)]
    if task.holdout_test > 0:
        rows["train"], rows["test"] = hold_out(rows["train"], task.holdout_test, TEST_SEED)
    if task.holdout > 0:
        rows["train"], rows["validation"] = hold_out(rows["train"], task.holdout, seed)
    for split, count in task.limit.items():
        rows[split], _ = draw(rows.get(split, []), count, TEST_SEED if split == "test" else seed)
    for split in SPLITS:
        if not rows.get(split):
            raise DataError(f"task '{task.name}': split '{split}' is empty ({paths.get(split, 'held out')})")
    return rows


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows kept and rows held out, both in their order: `share` of them, at least one, drawn by the seed."""
    held, kept = draw(rows, max(1, round(share * len(rows))), seed)
    return kept, held


def draw(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The first `count` rows of a seeded permutation, and the others, both in their order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[int(i)] for i in sorted(order[:count])], [rows[int(i)] for i in sorted(order[count:])]


def make_row(task: Task, form: PromptForm, where: str, raw: Mapping[str, Any]) -> Row:
    """Put one row into words. Raises DataError for a missing field or an unknown label."""
    if form.prompts is not None and form.prompt_by is not None:
        choice = str(_field(raw, form.prompt_by, where))
        if choice not in form.prompts:
            raise DataError(f"{where}: {form.prompt_by} is '{choice}'; expected one of {sorted(form.prompts)}")
        template = form.prompts[choice]
    else:
        template = form.prompt or ""
    prompt = fill(template, raw, where)
    label = str(_field(raw, task.label, where))
    if form.words is not None:
        labels = list(form.words)
        if label not in form.words:
            raise DataError(f"{where}: label '{label}' has no label word; known labels: {', '.join(labels)}")
        options, answer = tuple(form.words.values()), labels.index(label)
    else:
        options = tuple(fill(option, raw, where) for option in form.options or ())
        if not label.isdecimal() or int(label) >= len(options):
            raise DataError(f"{where}: label '{label}' is not the number of an option (0 to {len(options) - 1})")
        answer = int(label)
    return Row(prompt, options, answer, raw, where)


def passage_of(task: Task, row: Row) -> str:
    """The text that may be cut. Raises DataError if the row has no such field."""
    assert task.passage is not None
    return _text(_field(row.fields, task.passage, row.where))


def refill(task: Task, form: PromptForm, row: Row, passage: str) -> str:
    """The row's prompt with another passage: how a prompt is cut to fit without losing its question."""
    assert task.passage is not None
    raw = {**row.fields, task.passage: passage}
    return make_row(task, form, row.where, raw).prompt


def fill(template: str, raw: Mapping[str, Any], where: str) -> str:
    """Fill a template with a row's fields. Raises DataError for a missing field."""
    values = {name: _text(_field(raw, name, where)) for name in template_fields(template)}
    return template.format(**values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _field(raw: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in raw:
        raise DataError(f"{where}: field '{name}' is missing; the row has {', '.join(sorted(raw)) or 'none'}")
    value = raw[name]
    return value if not isinstance(value, bool) else str(value).lower()
