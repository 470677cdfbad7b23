"""A task as data: where its rows are, how a row is put to a model, which metrics count.

A shipped task is one TOML file beside this module; the user's own is a jsonl file with a prompt
in the run's configuration. `read.py` has the file formats, `form.py` the prompts, `rows.py` the rows.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

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

from plugbridge.errors import ConfigError, first_problem
from plugbridge.parsing import one_line, shown
from plugbridge.tasks.form import PromptForm, template_fields
from plugbridge.tasks.read import Format, Jsonl
from plugbridge.tasks.unfold import Unfolding

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Leaderboard(_Strict):
    """The file that SuperGLUE's leaderboard takes, and the test rows that it answers.

    A line holds a row's idx and label (`shape` row: the label under its name in `labels`, if it has another there),
    its idx and a text (`shape` text), or all answers of a paragraph, by question (`shape` questions).
    """

    file: str
    rows: str = "test.jsonl"
    shape: Literal["row", "text", "questions"] = "row"
    labels: dict[str, str | int] = {}


class Hub(_Strict):
    """The task on the Hugging Face hub: repository, configuration, and the label names of its label numbers.

    `test` is the configuration whose test split has labels, where there is one.
    """

    path: str
    name: str
    labels: tuple[str, ...] = ()
    test: str | None = None

    @property
    def places(self) -> dict[Split, tuple[str, str]]:
        """Configuration and split there, by split here: elsewhere the hub's test rows have no labels."""
        test = (self.name, "validation") if self.test is None else (self.test, "test")
        return {"train": (self.name, "train"), "test": test}


class Task(_Strict):
    """One task.

    `folder` is looked up in the data directory, then in the folders of it that `within` names; the files lie in it or
    in one of the folders `inside` it. A `shipped` task's is beside this module. `or_files` are other distributions'
    names of the same splits; the first set that is there as a whole is read. `format` says how the `files` are
    written, `unfold` how one of their objects becomes rows, and `id` names the field that no two rows of a file share.
    Of the fields that a prompt names, only those in `blank` may be blank. `holdout_test` is the share of the train
    rows that becomes the test split where there is no test file;
    `holdout` is the share of the rest that becomes the validation split where there is no
    validation file; rows with the same `group` field are held out together. `limit` is the most rows a
    split may have, after holding out. Validation rows, and train rows under a limit, are drawn by the
    run's seed; test rows always by `TEST_SEED`.
    """

    name: str
    title: str
    source: str
    licence: str
    folder: str
    within: tuple[str, ...] = Field(default=(), exclude=True)  # where files lie changes no result
    inside: tuple[str, ...] = Field(default=(), exclude=True)
    shipped: bool = False
    files: dict[str, str]
    or_files: tuple[dict[str, str], ...] = Field(default=(), exclude=True)  # what they hold is digested
    format: Format = Jsonl()
    unfold: Unfolding | None = None
    id: str | None = Field(default=None, exclude=True)  # what is refused changes no result
    blank: tuple[str, ...] = Field(default=(), exclude=True)  # nor does this
    group: str | None = None
    holdout: float = Field(default=0.0, ge=0, lt=1)
    holdout_test: float = Field(default=0.0, ge=0, lt=1)
    limit: dict[Split, PositiveInt] = {}
    label: str
    passage: str | None = None
    metrics: tuple[str, ...]
    causal: PromptForm
    seq2seq: PromptForm | None = None
    leaderboard: Leaderboard | None = Field(default=None, exclude=True)  # so these two
    hub: Hub | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _hold_out_what_no_file_has(self) -> "Task":
        for key, share, split in (
            ("holdout", self.holdout, "validation"),
            ("holdout_test", self.holdout_test, "test"),
        ):
            if share > 0 and split in self.files:
                raise ValueError(f"give either `{key}` or a {split} file")
        return self

    @model_validator(mode="after")
    def _same_splits(self) -> "Task":
        for names in self.or_files:
            if set(names) != set(self.files):
                raise ValueError(f"`or_files` has {', '.join(names)}; expected {', '.join(self.files)}, as in `files`")
        return self

    @model_validator(mode="after")
    def _write_what_the_label_says(self) -> "Task":
        for form in (self.causal, self.seq2seq):
            if form is None or form.generate is None or form.judge is not None:
                continue
            if self.label not in template_fields(form.generate):
                field = one_line(self.label, 80)
                raise ValueError(f"`generate` is {shown(form.generate)}; it must hold the label's field, {{{field}}}")
        return self

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A task that does not use the later keys is dumped, and so digested by its runs, as it was before them."""
        later = {
            "format": self.format == Jsonl(), "holdout_test": self.holdout_test == 0, "limit": not self.limit,
            "unfold": self.unfold is None, "group": self.group is None,
        }  # fmt: skip
        return {key: value for key, value in dump(self).items() if not later.get(key, False)}

    def form(self, kind: str) -> PromptForm:
        """The prompt form for ``causal`` or ``seq2seq`` models."""
        return self.seq2seq if kind == "seq2seq" and self.seq2seq is not None else self.causal


def task_names() -> list[str]:
    """Names of all shipped tasks, sorted."""
    root = files("plugbridge.tasks")
    return sorted(p.name.removesuffix(".toml") for p in root.iterdir() if p.name.endswith(".toml"))


@cache
def load_task(name: str) -> Task:
    """Read ``tasks/<name>.toml``. Raises ConfigError."""
    if name not in task_names():
        known = ", ".join(task_names())
        raise ConfigError(f"no task {shown(name)}; known: {known}; your own rows go in a table under `task:`")
    path = files("plugbridge.tasks") / f"{name}.toml"
    return parse_task(tomllib.loads(path.read_text(encoding="utf-8")), f"{name}.toml")


def parse_task(raw: Mapping[str, Any], source: str) -> Task:
    """Check a task's data. Raises ConfigError that names source and key."""
    try:
        return Task.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_problem(error, source)) from error
