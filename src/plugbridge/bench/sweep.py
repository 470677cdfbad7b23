"""`plugbridge sweep`: runs that differ in a few settings, compared on validation rows."""

import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from plugbridge.bench.commits import commits_of_run, commits_said
from plugbridge.config import RunConfig, load_config
from plugbridge.errors import ConfigError, DataError, RunError
from plugbridge.parsing import shown
from plugbridge.report import PROPORTIONS, TITLES, read_report, save_picture, wilson
from plugbridge.stages.predictions import right_rows
from plugbridge.transfer.acting import without_idle_steps

JUDGED = "evaluate.split=validation"
MOST = 1000
"""Runs of a sweep."""
NAMED = 5
"""Runs that a verdict names."""
_NAME = 120  # characters of a run's folder


@dataclass(frozen=True)
class Tried:
    """A run of a sweep: what it was set to, and each model's value of the task's first metric; or why it has none."""

    sets: tuple[str, ...]
    values: Mapping[str, float]
    metric: str
    rows: int
    failed: str = ""
    right: Mapping[str, tuple[bool, ...]] = field(default_factory=dict[str, tuple[bool, ...]])
    """Which rows each model got right, in their order."""
    commits: Mapping[str, str] = field(default_factory=dict[str, str])


def sweep_configs(config: Path, sets: Sequence[str], varied: Sequence[str], model: str) -> dict[str, RunConfig]:
    """Every combination of the varied keys' values, by the run's name. Raises ConfigError.

    `varied` holds ``key=value,value``; all runs are judged on validation rows, whatever the file says.
    """
    chosen = combinations(varied)
    for text in sets:
        if any(text.partition("=")[0].strip() == each.partition("=")[0] for each in next(iter(chosen.values()))):
            raise ConfigError(f"--set {shown(text)}: --vary has values for this key, too; keep one of the two")
    found = {name: without_idle_steps(load_config(config, (*sets, *each, JUDGED))) for name, each in chosen.items()}
    asked = [*TITLES] if (models := next(iter(found.values())).evaluate.models) is None else models
    if model not in asked:
        raise ConfigError(f"--by {model}: the runs will have {', '.join(asked)}")
    return found


def combinations(varied: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every combination as overrides, by a name that can be a folder's. Raises ConfigError."""
    choices: list[list[str]] = []
    keys: list[str] = []
    for text in varied:
        key, equals, written = text.partition("=")
        key, values = key.strip(), split_values(written, f"--vary {shown(text)}") if equals else []
        if not key or not values:
            raise ConfigError(
                f"--vary {shown(text)}: expected key=value,value, such as couple.learning_rate=0.001,0.003"
            )
        if key == "evaluate.split":
            raise ConfigError("--vary evaluate.split: settings are chosen on validation rows only")
        if key in keys:
            raise ConfigError(f"--vary {shown(text)}: {shown(key)} is varied twice; give all its values at once")
        keys.append(key)
        choices.append([f"{key}={value}" for value in values])
    count = math.prod(map(len, choices))
    if count > MOST:
        raise ConfigError(f"--vary: {count:,} combinations; {MOST:,} are run at most")
    return {_folder(chosen, choices): chosen for chosen in itertools.product(*choices)}


def split_values(text: str, source: str) -> list[str]:
    """Values between commas, each as it is written; a comma inside of quotes or brackets is the value's own.

    Raises ConfigError for a value that is empty or stands twice, and for what is not closed.
    """
    values, begin, quote, open_brackets = [""], True, "", 0
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (begin or open_brackets):
            quote = letter
        elif letter in "[{":
            open_brackets += 1
        elif letter in "]}":
            open_brackets = max(0, open_brackets - 1)
        elif letter == "," and not open_brackets:
            values.append("")
            begin = True
            continue
        begin = begin and letter.isspace()
        values[-1] += letter
    if quote or open_brackets:
        raise ConfigError(f"{source}: a {'quote' if quote else 'bracket'} is not closed")
    for number, value in enumerate(values):
        if not value.strip():
            raise ConfigError(f"{source}: a value between commas is empty; leave it out, or write '' for an empty text")
        if value in values[:number]:
            raise ConfigError(f"{source}: {shown(value)} stands twice")
    return values


def _folder(chosen: Sequence[str], choices: Sequence[Sequence[str]]) -> str:
    """A run's name: its settings in letters that any file system takes, and a digest where they would not tell all."""
    plain = [[re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII) for text in texts] for texts in choices]
    name = "_".join(texts[list(given).index(text)] for texts, given, text in zip(plain, choices, chosen, strict=True))
    told = len(name) <= _NAME and all(len(set(texts)) == len(texts) for texts in plain)
    return name if told else f"{name[:_NAME]}-{hashlib.sha256(repr(tuple(chosen)).encode()).hexdigest()[:8]}"


def tried(names: Mapping[str, tuple[str, ...]], root: Path, reasons: Mapping[str, str]) -> list[Tried]:
    """What finished runs gave, in their order."""
    found: list[Tried] = []
    for name, chosen in names.items():
        if name in reasons:
            found.append(Tried(chosen, {}, "", 0, reasons[name]))
            continue
        report = read_report(root / name)
        values = {row["name"]: float(row["value"]) for row in report["rows"]}
        right = {model: rows_right(root / name, model) for model in values}
        metric, rows = report["rows"][0]["metric"], int(report["rows"][0]["n"])
        found.append(Tried(chosen, values, metric, rows, right=right, commits=commits_of_run(root / name)))
    return found


def rows_right(root: Path, model: str) -> tuple[bool, ...]:
    """Which rows a finished run's model got right, by its predictions. Raises RunError."""
    path = root / "evaluate" / "predictions" / f"{model}.jsonl"
    try:
        return tuple(right_rows(path))
    except (DataError, KeyError) as error:
        raise RunError(f"{path} holds no predictions as a run leaves them; run the sweep again ({error})") from error


def apart(one: Sequence[bool], other: Sequence[bool], compared: int = 1) -> tuple[float, float, float]:
    """How many more of the same rows one run got right than another, as a share, and its 95 % interval.

    Of paired proportions with half a row added to each kind (Agresti and Min 2005), so that it has a width where two
    runs answer alike. Of so many intervals that are `compared`, 95 % is for all together (Bonferroni): a run that is
    not the best is better than the best in one of its own, so that with as many as there are other runs, one is taken
    for the best wrongly in 5 % at most, though it was chosen by the same rows (Hsu 1981).
    """
    more, fewer = (sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((one, other), (other, one)))
    n, b, c = len(one) + 2, more + 0.5, fewer + 0.5
    half = NormalDist().inv_cdf(1 - 0.025 / max(1, compared)) * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return (more - fewer) / len(one), (b - c) / n - half, (b - c) / n + half


def rivals(found: Sequence[Tried], best: Tried, model: str) -> list[Tried]:
    """The runs that are not clearly worse than the best: their rows' answers, compared one by one, leave it open.

    The more runs there are, the more it takes. A run whose answers are not known is not clearly anything.
    """
    others = [run for run in found if run is not best and run.values]
    mine = best.right.get(model, ())
    return [
        run
        for run in others
        if not mine or len(theirs := run.right.get(model, ())) != len(mine) or apart(mine, theirs, len(others))[1] <= 0
    ]


def verdict(found: Sequence[Tried], model: str) -> str:
    """Which run is the best for a model, or that the rows do not tell, in one line; empty where none is done."""
    best = best_of(found, model)
    if best is None:
        return ""
    where, open_ones = f"for {model} on {best.rows:,} validation rows", rivals(found, best, model)
    level = [best, *(run for run in open_ones if run.values[model] == best.values[model])]
    chosen = _named([" ".join(f"--set {shlex.quote(text)}" for text in run.sets) for run in level])
    if not open_ones:
        return f"best {where}: {chosen}"
    others = [" ".join(run.sets) for run in open_ones if not any(run is one for one in level)]
    first = f"highest {where}" if len(level) == 1 else f"{len(level)} runs are level and highest {where}"
    apart_from = f"; not clearly apart from {'it' if len(level) == 1 else 'them'}, answer by answer: {_named(others)}"
    return f"{first}: {chosen}{apart_from if others else ''}"


def foot(found: Sequence[Tried]) -> str:
    """What a run has to be to be named the best, in one line; empty where there are no two."""
    count = sum(1 for run in found if run.values)
    if count < 2:
        return ""
    together = "at 95 %" if count == 2 else f"at 95 % for all {count - 1:,} comparisons together (Bonferroni)"
    return f"a run is named the best where it answers more of the same rows right than every other, {together}"


def _named(runs: Sequence[str]) -> str:
    """The first of some runs, and how many more there are."""
    return "; ".join(runs[:NAMED]) + (f"; and {len(runs) - NAMED:,} more" if len(runs) > NAMED else "")


def draw_sweep(found: Sequence[Tried], model: str, path: Path) -> None:
    """The value of every run for the model that is judged, as a PNG, with Wilson 95 % intervals of shares."""
    from matplotlib.figure import Figure

    done = [run for run in found if run.values]
    if not done:
        return
    best = best_of(found, model)
    level = [] if best is None else [best, *rivals(found, best, model)]
    values = [run.values[model] for run in done]
    top = max(values)  # of several runs where they are level
    shares = done[0].metric in PROPORTIONS
    spans = [wilson(v, run.rows) if shares else (v, v) for v, run in zip(values, done, strict=True)]
    figure = Figure(figsize=(7.2, 0.34 * len(done) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (run, value, (low, high)) in enumerate(zip(done, values, spans, strict=True)):
        colour = "#c1440e" if any(run is one for one in level) else "#8a8a8a"
        axes.plot([low, high], [place, place], color=colour, lw=1.4)
        axes.plot([value], [place], "o", color=colour, ms=6 if value == top else 4)
        axes.annotate(f"{value:.3f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(done)), [", ".join(run.sets) for run in done], fontsize=8)
    axes.set_ylim(len(done) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{done[0].metric} on {done[0].rows:,} validation rows, one run each", fontsize=9)
    one = "the best" if len(level) == 1 else "not clearly apart from the highest"
    axes.set_title(f"{TITLES[model]}; red: {one}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def best_of(found: Sequence[Tried], model: str) -> Tried | None:
    """The run whose model has the largest value; the first of equals. Raises ConfigError for an unknown model."""
    done = [run for run in found if run.values]
    for run in done:
        if model not in run.values:
            raise ConfigError(f"--by {model}: the runs have {', '.join(run.values)}")
    return max(done, key=lambda run: run.values[model], default=None)


def sweep_page(found: Sequence[Tried], model: str, command: str) -> str:
    """A Markdown table of all runs; the best of the model that is judged is bold, if it is clearly the best."""
    best = best_of(found, model)
    names = list(dict.fromkeys(name for run in found for name in run.values))
    keys = [text.partition("=")[0] for text in found[0].sets]
    lines = ["# Sweep", "", *([f"{best.metric} on {best.rows:,} validation rows, one run each."] if best else [])]
    said = verdict(found, model)
    lines += ["", f"{said[0].upper()}{said[1:]}."] if best else []  # settings keep their capital letters
    commits = dict.fromkeys(commits_said(run.commits) for run in found if run.commits)
    lines += ["", f"Models from the hub: {'; '.join(commits)}."] if commits else []
    lines += ["", "Made by", "", f"    {command}", ""]
    lines += ["| " + " | ".join([*keys, *(TITLES[name] for name in names)]) + " |"]
    lines += ["|" + "---|" * (len(keys) + len(names))]
    for run in found:
        values = [f"{run.values[name]:.3f}" if name in run.values else "" for name in names]
        if best is not None and run is best and not rivals(found, best, model):
            values[names.index(model)] = f"**{values[names.index(model)]}**"
        lines.append("| " + " | ".join([*(text.partition("=")[2] for text in run.sets), *values]) + " |")
    if said := foot(found):
        lines += ["", f"{said[0].upper()}{said[1:]}."]
    failed = [f"- {' '.join(run.sets)}: {run.failed}" for run in found if run.failed]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else []), ""])


def as_json(found: Sequence[Tried]) -> list[dict[str, Any]]:
    """The runs as JSON."""
    fields = ({**vars(run), "values": dict(run.values), "commits": dict(run.commits)} for run in found)
    return [json.loads(json.dumps({key: value for key, value in run.items() if key != "right"})) for run in fields]
