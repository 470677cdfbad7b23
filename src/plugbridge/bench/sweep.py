"""`plugbridge sweep`: runs that differ in a few settings, compared on validation rows."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugbridge.config import RunConfig, load_config
from plugbridge.errors import ConfigError
from plugbridge.report import TITLES, read_report

JUDGED = "evaluate.split=validation"


@dataclass(frozen=True)
class Tried:
    """A run of a sweep: what it was set to, and each model's value of the task's first metric; or why it has none."""

    sets: tuple[str, ...]
    values: Mapping[str, float]
    metric: str
    rows: int
    failed: str = ""


def sweep_configs(config: Path, sets: Sequence[str], varied: Sequence[str], model: str) -> dict[str, RunConfig]:
    """Every combination of the varied keys' values, by the run's name. Raises ConfigError.

    `varied` holds ``key=value,value``; all runs are judged on validation rows, whatever the file says.
    """
    found = {name: load_config(config, (*sets, *chosen, JUDGED)) for name, chosen in combinations(varied).items()}
    asked = [*TITLES] if (models := next(iter(found.values())).evaluate.models) is None else models
    if model not in asked:
        raise ConfigError(f"--by {model}: the runs will have {', '.join(asked)}")
    return found


def combinations(varied: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every combination as overrides, by a name that can be a folder's. Raises ConfigError."""
    choices: list[list[str]] = []
    for text in varied:
        key, equals, values = text.partition("=")
        found = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not key.strip() or not found:
            raise ConfigError(f"--vary {text!r}: expected key=value,value, such as couple.learning_rate=0.001,0.003")
        if key.strip() == "evaluate.split":
            raise ConfigError("--vary evaluate.split: settings are chosen on validation rows only")
        choices.append([f"{key.strip()}={value}" for value in found])
    return {re.sub(r"[^\w.=+-]+", "-", "_".join(chosen)): chosen for chosen in itertools.product(*choices)}


def tried(names: Mapping[str, tuple[str, ...]], root: Path, reasons: Mapping[str, str]) -> list[Tried]:
    """What finished runs gave, in their order."""
    found: list[Tried] = []
    for name, chosen in names.items():
        if name in reasons:
            found.append(Tried(chosen, {}, "", 0, reasons[name]))
            continue
        report = read_report(root / name)
        values = {row["name"]: float(row["value"]) for row in report["rows"]}
        found.append(Tried(chosen, values, report["rows"][0]["metric"], int(report["rows"][0]["n"])))
    return found


def best_of(found: Sequence[Tried], model: str) -> Tried | None:
    """The run whose model has the largest value; the first of equals. Raises ConfigError for an unknown model."""
    done = [run for run in found if run.values]
    for run in done:
        if model not in run.values:
            raise ConfigError(f"--by {model}: the runs have {', '.join(run.values)}")
    return max(done, key=lambda run: run.values[model], default=None)


def sweep_page(found: Sequence[Tried], model: str, command: str) -> str:
    """A Markdown table of all runs; the best of the model that is judged is bold."""
    best = best_of(found, model)
    names = list(dict.fromkeys(name for run in found for name in run.values))
    keys = [text.partition("=")[0] for text in found[0].sets]
    lines = ["# Sweep", "", *([f"{best.metric} on {best.rows:,} validation rows, one run each."] if best else [])]
    lines += ["", "Made by", "", f"    {command}", ""]
    lines += ["| " + " | ".join([*keys, *(TITLES[name] for name in names)]) + " |"]
    lines += ["|" + "---|" * (len(keys) + len(names))]
    for run in found:
        values = [f"{run.values[name]:.3f}" if name in run.values else "" for name in names]
        if run is best:
            values[names.index(model)] = f"**{values[names.index(model)]}**"
        lines.append("| " + " | ".join([*(text.partition("=")[2] for text in run.sets), *values]) + " |")
    failed = [f"- {' '.join(run.sets)}: {run.failed}" for run in found if run.failed]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else []), ""])


def as_json(found: Sequence[Tried]) -> list[dict[str, Any]]:
    """The runs as JSON."""
    return [json.loads(json.dumps({**vars(run), "values": dict(run.values)})) for run in found]
