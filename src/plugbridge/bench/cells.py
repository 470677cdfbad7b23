"""Making the paper's tables: run what a table needs, and set what came out beside what was printed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plugbridge.bench.commits import commits_of_run, commits_said
from plugbridge.bench.paper import Choice, Counts, Pair, Planned, Row, Table, planned, run_configs
from plugbridge.config import RunConfig, load_config
from plugbridge.errors import ConfigError, DataError, ModelError, PlugbridgeError, RunError
from plugbridge.markers import check_root, write_own
from plugbridge.memory.case import Case
from plugbridge.memory.shapes import PUBLISHED
from plugbridge.models import layout_for, load_model, parameter_count
from plugbridge.preflight import resolve
from plugbridge.prepare import prepare
from plugbridge.progress import Progress
from plugbridge.report import read_report
from plugbridge.run import borrow, execute, locked
from plugbridge.shrink.sizes import budgeted_sizes, count_parameters
from plugbridge.sources import commit_of, pinned
from plugbridge.stages.build import build_stages, same_result
from plugbridge.stages.depends import rate_of_baseline, rate_of_training
from plugbridge.tuners.table import find_method

SHARE = "% of the model's"
Announce = Callable[[str, str], None]


@dataclass(frozen=True)
class Reproduced:
    """One cell: the printed value (null in the demonstration), ours (null if it was not run), and how it was made.

    Values are percent, or what `metric` says. `n` counts test rows, `obtained` names the run's directory, the model in
    it and how that was trained, or says why there is no value. `commits` are those of models from the hub.
    """

    table: str
    row: str
    task: str
    metric: str
    printed: float | None
    value: float | None
    difference: float | None
    n: int | None
    obtained: str
    commits: Mapping[str, str] = field(default_factory=dict[str, str])


def run_table(
    name: str, table: Table, choice: Choice, tasks: Sequence[str] | None, data: Path | None, root: Path,
    progress: Progress, announce: Announce,
) -> dict[str, str]:  # fmt: skip
    """Do a table's runs that are not done; `announce(run, what)` is told ``running`` or why one cannot be.

    A task whose files are not there, a model that cannot be loaded and a stage that fails (its loss is not finite, say)
    leave their runs out: returned are their reasons by run. Stages that runs share are done once.
    """
    return do_runs(run_configs(table, choice, tasks), home_of(root, choice, name), data, progress, announce)


def do_runs(
    configs: Mapping[str, RunConfig],
    root: Path,
    data: Path | None,
    progress: Progress,
    announce: Announce,
    origin: Path | None = None,
) -> dict[str, str]:
    """Do runs by name, each in a folder of its own; returns why some could not be or did not end.

    Stages that were done with other settings are set aside, and taken back when those are asked for again. Raises
    RunError where the runs are of another `origin`, the file that the settings are from.
    """
    reasons: dict[str, str] = {}
    for name in configs:
        check_root(root / name, origin, None)
    donors = sorted(filter(_is_folder, root.parent.glob("*/*")))
    for name, config in configs.items():
        folder = root / name
        announce(name, "running")
        try:
            prepared = prepare(config, data)
        except (DataError, ModelError) as error:
            reasons[name] = str(error)
            announce(name, str(error))
            continue
        with locked(folder, origin, None):
            write_own(folder, "config.yaml", config.model_dump_json(indent=2))  # JSON is YAML
            stages = build_stages(prepared, folder, progress)
            borrow(folder, [donor for donor in donors if donor != folder], stages)
            try:
                execute(folder, stages, None, lambda _stage, _what: None, redo=True)
            except (PlugbridgeError, torch.OutOfMemoryError) as error:
                reasons[name] = str(error).partition("\n")[0]
                announce(name, reasons[name])
                continue
        donors.append(folder)
    return reasons


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # somebody else's, which we may not look into
        return False


def home_of(root: Path, choice: Choice, table: str) -> Path:
    """Where a choice's runs for a table or figure are. Runs of two tables may differ in the models that they make."""
    how = f"-{choice.mode}" if table != "fig1b" else ""
    return root / f"{table}-{_slug(choice.pair.small)}-{_slug(choice.pair.large)}{how}-s{choice.seed}"


def named(pair: Pair) -> str:
    """A pair as a page names it: of directories the last two parts."""
    return " and ".join("/".join(Path(source).parts[-2:]) for source in (pair.small, pair.large))


def _slug(source: str) -> str:
    return "-".join(Path(source).parts[-2:])


def collect(
    name: str, table: Table, choice: Choice, tasks: Sequence[str] | None, root: Path, reasons: Mapping[str, str]
) -> list[Reproduced]:
    """The table's cells from finished runs; a cell whose run was not done, or done otherwise, is empty."""
    configs = run_configs(table, choice, tasks)
    home = home_of(root, choice, name)
    reports = {run: _report(home / run, config) for run, config in configs.items()}
    found: list[Reproduced] = []
    for cell in planned(table, choice.demo):
        report, where = reports.get(cell.run), str(home / cell.run)
        made = None
        if report is not None:
            commits = commits_of_run(home / cell.run)
            how = f"{where}: {cell.row.model}, {_training(configs[cell.run], cell.row.model, report)}"
            made = _Made(report, ", ".join(filter(None, (how, commits_said(commits)))), commits)
        if table.counts_parameters and not any(other.row == cell.row.label for other in found):
            found.append(_parameters(name, cell.row, made, choice.demo))
        found.append(_cell(name, cell, made, reasons))
    return found


@dataclass(frozen=True)
class _Made:
    """A finished run's report, and how the model that a cell is about was made in it."""

    report: dict[str, Any]
    how: str
    commits: Mapping[str, str]

    def row(self, model: str) -> dict[str, Any]:
        """What the report says of a model."""
        return next(row for row in self.report["rows"] if row["name"] == model)


def _training(config: RunConfig, model: str, report: Mapping[str, Any]) -> str:
    """How a model was trained, in words."""
    sections = {"small_tuned": config.tune, "large_tuned": config.ceiling, "large_plugged": config.couple}
    settings: Any = sections[model] if model in sections else getattr(config.baselines, model)
    method = find_method(config.method.name)
    rate = rate_of_training(settings, method) if model in sections else rate_of_baseline("finetuned", settings)
    said = f"{settings.steps:,} steps of {settings.batch_size} rows at {rate:g}"
    if model != "large_plugged":
        return said
    bridge = report["models"]["bridge"]
    through = "without a Bridge" if bridge is None else f"through a Bridge of 1/{1 / bridge['share']:.1f}"
    return f"coupled {config.couple.mode} {through}, {said}"


def _parameters(table: str, row: Row, made: _Made | None, demo: bool) -> Reproduced:
    """The column of parameters: what a tuned model's checkpoint adds or changes."""
    value = None
    if made is not None:
        size = made.report["models"]["large" if row.model.startswith("large") else "small"]["parameters"]
        value = 100 * made.row(row.model)["parameters"]["changed"] / size
    printed = None if demo else row.parameters
    difference = None if value is None or printed is None else value - printed
    how, commits = ("not run", {}) if made is None else (made.how, made.commits)
    return Reproduced(table, row.label, "#Params", SHARE, printed, value, difference, None, how, commits)


def _report(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """A run's report, if it is finished with today's settings."""
    try:
        same = same_result(resolve(load_config(folder / "config.yaml")), resolve(config))
        return read_report(folder) if same else None
    except (RunError, ConfigError):  # none, not finished, or of another version
        return None


def _cell(table: str, cell: Planned, made: _Made | None, reasons: Mapping[str, str]) -> Reproduced:
    printed = None if math.isnan(cell.printed) else cell.printed
    value, n, commits = None, None, {}
    obtained = reasons.get(cell.run, "not run")
    if made is not None:
        row = made.row(cell.row.model)
        value, n, obtained = 100 * float(row["metrics"][cell.metric]), int(row["n"]), made.how
        commits = made.commits
    return Reproduced(
        table=table, row=cell.row.label, task=cell.column.task, metric=cell.metric, printed=printed, value=value,
        difference=None if value is None or printed is None else value - printed, n=n, obtained=obtained,
        commits=commits,
    )  # fmt: skip


def count_table(counts: Counts, pairs: Mapping[str, Pair], printed: bool) -> list[Reproduced]:
    """Parameters of small, large and a Bridge of 1/16 of the large one, from the models' names and shapes alone."""
    cells: list[Reproduced] = []
    for name, pair in pairs.items():
        found, obtained, commits = _counted(pair)
        _, whole, bridge = found
        if whole is not None and bridge is not None:
            obtained = f"{obtained}; the Bridge is 1/{whole / bridge:.1f} of the large model"
        beside = counts.pairs[name] if printed else (None, None, None)
        for what, value, said in zip(("small", "large", "Bridge"), found, beside, strict=True):
            difference = None if value is None or said is None else value - said
            cells.append(
                Reproduced("table2", name, what, "million parameters", said, value, difference, None, obtained, commits)
            )
    return cells


def _counted(pair: Pair) -> tuple[tuple[float | None, ...], str, dict[str, str]]:
    shaped: list[str] = []
    commits: dict[str, str] = {}
    try:
        small, large = (
            _without_weights(size, source, shaped, commits)
            for size, source in (("small", pair.small), ("large", pair.large))
        )
    except ModelError as error:
        return (None, None, None), str(error), {}
    layout = layout_for(large)
    names = {name for name, _ in large.named_parameters()}
    whole = parameter_count(large)
    bridge = count_parameters(layout, names, budgeted_sizes(layout, names, whole // 16))
    how = f"of the published shape of {' and '.join(shaped)}" if shaped else named(pair)
    how = ", ".join(filter(None, (how, commits_said(commits))))
    return tuple(count / 1e6 for count in (parameter_count(small), whole, bridge)), how, commits


def _without_weights(size: str, source: str, shaped: list[str], commits: dict[str, str]) -> PreTrainedModel:
    """A model on the meta device: of its own files, or of its published shape where they are not at hand.

    Which of the two it was, and the commit of files from the hub, is noted.
    """
    try:
        found = pinned(source)
        model = load_model(found, device="meta")
        if (commit := commit_of(found)) is not None:
            commits[size] = commit
        return model
    except ModelError:
        if source not in PUBLISHED:
            raise
    shaped.append(source)
    return Case(PUBLISHED[source], 1, 1).on_meta()[0]


def as_rows(cells: Sequence[Reproduced]) -> list[dict[str, Any]]:
    """The cells as JSON."""
    return [asdict(cell) for cell in cells]
