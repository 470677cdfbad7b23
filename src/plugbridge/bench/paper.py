"""The tables of Jin, Zhang, Zong (EMNLP 2023) as data, and the runs that make each of their cells."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plugbridge.bench.grid import nested
from plugbridge.config import RunConfig, apply_override, parse_config
from plugbridge.errors import ConfigError
from plugbridge.parsing import shown

Model = Literal["small_tuned", "small_finetuned", "large_tuned", "large_finetuned", "large_plugged"]
DEMO_TASK = "wordnet-kind"
OWNED = (
    "small",
    "large",
    "task",
    "seed",
    "method.name",
    "prune.budget",
    "prune.reduction",
    "couple.mode",
    "couple.plug",
    "evaluate.models",
    "evaluate.probe",
    "evaluate.split",
)
"""Settings of a run that a table's rows are about: not the user's to set."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pair(_Strict):
    """A small and a large model: Hugging Face ids or directories."""

    small: str
    large: str


class Column(_Strict):
    """A task of a table and the metrics that are printed for it, in the printed order."""

    task: str
    metrics: tuple[str, ...]


class Row(_Strict):
    """A row of a table: which model of a run it is, and the printed values (percent), metric by metric.

    `parameters` are the printed ones, in percent of the model's.
    """

    label: str
    model: Model
    method: str
    reduction: float = Field(default=16, gt=1)
    start: Literal["random", "fresh"] = "random"
    parameters: float | None = None
    values: tuple[float, ...]


class Table(_Strict):
    """A table that is made by runs; `note` is about its rows, `printed` about the values that the paper prints.

    `counts_parameters` is whether it has a column of them.
    """

    title: str
    pair: str
    note: str = ""
    printed: str = ""
    counts_parameters: bool = False
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _a_value_for_every_metric(self) -> "Table":
        count = sum(len(column.metrics) for column in self.columns)
        for row in self.rows:
            if len(row.values) != count:
                raise ValueError(f"row '{row.label}' has {len(row.values)} values; the columns need {count}")
        return self


class Counts(_Strict):
    """The table of parameter counts: small, large and Bridge in millions, by pair."""

    title: str
    note: str
    pairs: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Paper:
    """All tables, and the paper's pairs of models."""

    pairs: Mapping[str, Pair]
    tables: Mapping[str, Table]
    counts: Counts


@dataclass(frozen=True)
class Planned:
    """One cell before it is made: where it stands, what was printed, and the run and model that make it."""

    row: Row
    column: Column
    metric: str
    printed: float
    run: str


@dataclass(frozen=True)
class Choice:
    """What the user chose for a table: models, how to couple, the seed, and settings of every run."""

    pair: Pair
    mode: str
    seed: int
    sets: tuple[str, ...] = ()
    demo: bool = False


@cache
def load_paper() -> Paper:
    """Read ``paper.toml``."""
    raw = tomllib.loads((files("plugbridge.bench") / "paper.toml").read_text(encoding="utf-8"))
    pairs = {name: Pair.model_validate(pair) for name, pair in raw.pop("pairs").items()}
    counts = Counts.model_validate(raw.pop("table2"))
    return Paper(pairs, {name: Table.model_validate(table) for name, table in raw.items()}, counts)


def refuse_owned(sets: Sequence[str]) -> None:
    """Raise ConfigError for settings that a table sets itself, or that a section with some of them replaces."""
    for override in sets:
        key = override.partition("=")[0].strip()
        owned = next((o for o in OWNED if o == key or o.startswith(f"{key}.") or key.startswith(f"{o}.")), None)
        if owned is not None:
            option = "mode" if owned == "couple.mode" else owned
            instead = f"; give --{option}" if option in ("small", "large", "task", "seed", "mode") else ""
            raise ConfigError(f"--set {key}: the paper's tables set {owned} themselves{instead}")


def columns_of(table: Table, demo: bool) -> tuple[Column, ...]:
    """A table's columns; in the demonstration the shipped task alone, which the paper does not have."""
    return (Column(task=DEMO_TASK, metrics=("accuracy",)),) if demo else table.columns


def planned(table: Table, demo: bool) -> Iterator[Planned]:
    """Every cell of a table, row by row. In the demonstration no value was printed: NaN."""
    for row in table.rows:
        values = iter([float("nan")] if demo else row.values)
        for column in columns_of(table, demo):
            for metric in column.metrics:
                yield Planned(row, column, metric, next(values), run_name(row, column))


def run_name(row: Row, column: Column) -> str:
    """The run a cell comes from; rows of one method and Bridge share it."""
    return f"{column.task}-{row.method}-r{row.reduction:g}-{row.start}"


def run_configs(table: Table, choice: Choice, tasks: Sequence[str] | None) -> dict[str, RunConfig]:
    """Configurations of a table's runs by name, each making all models that the table's rows take from it.

    `tasks` are those to run, by default all. Raises ConfigError.
    """
    known = [column.task for column in columns_of(table, choice.demo)]
    for task in tasks or ():
        if task not in known:
            raise ConfigError(f"this table has no task {shown(task)}; it has {', '.join(known)}")
    wanted: dict[str, tuple[Row, Column, set[str]]] = {}
    for cell in planned(table, choice.demo):
        if tasks is None or cell.column.task in tasks:
            _, _, models = wanted.setdefault(cell.run, (cell.row, cell.column, set()))
            models.add(cell.row.model)
    return {name: _config(choice, *what) for name, what in wanted.items()}


def _config(choice: Choice, row: Row, column: Column, models: set[str]) -> RunConfig:
    settings: dict[str, Any] = {
        "small": choice.pair.small,
        "large": choice.pair.large,
        "task": column.task,
        "seed": choice.seed,
        "method.name": row.method,
        "prune.budget": 1 / row.reduction,
        "couple.mode": choice.mode,
        "couple.optimizer": "adamw",
        "couple.plug": row.start,
        "evaluate.models": sorted(models),
    }
    if "large_tuned" in models:
        settings["ceiling"] = {}
    for name in ("small_finetuned", "large_finetuned"):
        if name in models:
            settings[f"baselines.{name}"] = {}
    raw = nested(settings)
    return parse_config(_overridden(raw, choice.sets, models), "reproduce")


def _overridden(raw: dict[str, Any], sets: Sequence[str], models: set[str]) -> dict[str, Any]:
    """The settings with the user's, of which those of models that are not made are left out."""
    unmade = {
        "ceiling": "large_tuned" not in models,
        "baselines.small_finetuned": "small_finetuned" not in models,
        "baselines.large_finetuned": "large_finetuned" not in models,
    }
    for override in sets:
        if not any(skipped and override.startswith(f"{section}.") for section, skipped in unmade.items()):
            raw = apply_override(raw, override)
    return raw
