"""Quality of the transfer over a grid: run it, resume it, and reduce it to cells with intervals."""

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugbridge.bench.commits import commits_of_run
from plugbridge.bench.grid import Grid, Group, slug
from plugbridge.config import RunConfig, parse_config
from plugbridge.errors import DataError, RunError
from plugbridge.files import write_json
from plugbridge.imports import leave_out_bitsandbytes
from plugbridge.markers import read_marker, write_own
from plugbridge.parsing import read_json
from plugbridge.preflight import resolve
from plugbridge.prepare import Prepared, prepare
from plugbridge.progress import Progress, Silent
from plugbridge.run import borrow, execute, facts_of, locked
from plugbridge.stages.build import build_stages, same_result
from plugbridge.stages.predictions import right_rows
from plugbridge.stages.shrink import rows_scored
from plugbridge.transfer.needed import stages_of
from plugbridge.workers import workers

REFERENCES = {
    "small_tuned": "small tuned",
    "large_zero_shot": "large zero-shot",
    "large_probe": "linear probe",
    "large_tuned": "large tuned",
    "large_proxy": "proxy-tuning",
    "large_ladder": "Ladder Side-Tuning",
}
RESAMPLES = 2000
Difference = tuple[float, float, float]
"""A difference of two PGRs and its interval."""
Answers = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    """One number with its interval.

    `value` is the mean metric over seeds, `pgr` the performance gap recovered of the means; `low`,
    `high`, `pgr_low` and `pgr_high` are 95 % percentile intervals of a bootstrap over seeds and test
    rows, the same rows for all models and seeds. `control` names what the row is compared with, null for
    the method itself. `seconds` and `peak_bytes` are of coupling; `large_rows` the rows that the large model read until
    the module was plugged in, for importance, repair and the start, too. `differences` are PGRs above those of other
    variants, by their names, on the seeds that both have.
    """

    family: str
    method: str
    mode: str
    bridge_share: float | None
    down: str | None
    start: str | None
    task: str
    seeds: list[int]
    metric: str
    value: float
    low: float
    high: float
    pgr: float | None
    pgr_low: float | None
    pgr_high: float | None
    control: str | None
    command: str
    variant: str
    n: int
    majority: float
    large_rows: int | None
    seconds: float | None
    peak_bytes: int | None
    differences: dict[str, Difference] = field(default_factory=dict[str, Difference])
    split: str = "test"
    """Which rows `value` is of."""
    commits: dict[str, str] = field(default_factory=dict[str, str])
    """Of models from the hub, by size; runs of other commits are other cells."""
    bits: int | None = None
    """Bits of a weight in the Bridge's blocks."""
    bridge_bytes_share: float | None = None
    """The Bridge's bytes over those of the large model in bfloat16."""


def run_group(group: Group, data: Path | None, out: Path, grid: Path | None = None) -> str:
    """Do a group's runs that are not done; the stages that variants share are done once. Returns its name.

    What was done with other settings of the `grid` file is set aside, and taken back when those are asked for again.
    """
    import torch

    from plugbridge.models import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()
    donors: list[Path] = []
    prepared: Prepared | None = None
    for name, config in group.variants:
        root = out / group.name / slug(name)
        with locked(root, grid, None):
            write_own(root, "config.yaml", config.model_dump_json(indent=2))  # JSON is YAML
            prepared = prepare(config, data, prepared)
            stages = build_stages(prepared, root, Silent())
            borrow(root, donors, stages)
            execute(root, stages, None, lambda _stage, _what: None, redo=True)
        donors.append(root)
    return group.name


def run_groups(
    groups: Sequence[Group], data: Path | None, out: Path, jobs: int, progress: Progress, grid: Path | None = None
) -> None:
    """Run groups, at most `jobs` at a time, each in a process of its own with one thread.

    The first error stops the grid after the runs in progress; what is done stays done.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers inherit it
    with progress.bar("bench quality", len(groups)) as advance, workers(jobs, ready=leave_out_bitsandbytes) as pool:
        waiting = list(groups)
        running: set[Future[str]] = set()
        while waiting or running:
            while waiting and len(running) < jobs:
                advance(0, waiting[0].name)
                running.add(pool.submit(run_group, waiting.pop(0), data, out, grid))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                advance(1)


def answers(root: Path, model: str) -> Answers | None:
    """Which rows a model of a run got right; None if the run did not score it."""
    path = root / "evaluate" / "predictions" / f"{model}.jsonl"
    if not path.is_file():
        return None
    try:
        return np.array(right_rows(path))
    except (DataError, KeyError) as error:
        raise RunError(f"{path} holds no predictions as a run leaves them; run its variant again ({error})") from error


def finished(group: Group, name: str, out: Path) -> bool:
    """Whether a variant was scored with the settings that it has in the grid now, those apart that change no result."""
    root = out / group.name / slug(name)
    if read_marker(root / "evaluate") is None:
        return False
    written = parse_config(read_json(root / "config.yaml", RunError), str(root))
    return same_result(resolve(written), resolve(dict(group.variants)[name]))


def done(group: Group, name: str, out: Path) -> bool:
    """Whether a variant is finished, on the commits of the models that the group's first variant is of."""
    first, own = (out / group.name / slug(variant) for variant in (group.variants[0][0], name))
    return finished(group, name, out) and commits_of_run(own) == commits_of_run(first)


def left_out(groups: Sequence[Group], out: Path) -> tuple[int, dict[str, list[str]]]:
    """How many runs are done, and the variants of which a seed is not, by task, family and method.

    No name is given where there is nothing of a place.
    """
    count: dict[str, int] = {}
    missing: dict[str, dict[str, None]] = {}
    for group in groups:
        place = f"{group.task}, {group.pair}, {group.method}"
        names = [name for name, _ in group.variants if not done(group, name, out)]
        count[place] = count.get(place, 0) + len(group.variants) - len(names)
        missing.setdefault(place, {}).update(dict.fromkeys(names))
    left = {place: list(names) if count[place] else [] for place, names in missing.items() if names}
    return sum(count.values()), left


def cells_of(grid: Grid, groups: Sequence[Group], out: Path, command: str) -> list[Cell]:
    """Reduce finished runs to cells; each says which seeds it has. Runs of other commits are other cells."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        first = group.variants[0][0]
        if finished(group, first, out):
            commits = commits_of_run(out / group.name / slug(first))
            found.setdefault((group.pair, group.method, group.task, *sorted(commits.values())), []).append(group)
    cells: list[Cell | None] = []
    for same in found.values():
        for model, title in REFERENCES.items():
            cells.append(_cell(same, out, same[0].variants[0][0], model, title, title, command))
        for name, _ in same[0].variants:
            have = [group for group in same if done(group, name, out)]
            control = name if grid.variants[name].control else None
            label = f"{name}, the Bridge itself"
            if have:
                cell = _cell(have, out, name, "large_plugged", name, control, command)
                others = [other for other in grid.compare if other != name and other in dict(same[0].variants)]
                cells.append(None if cell is None else replace(cell, differences=_differences(have, out, name, others)))
                if control is None:
                    cells.append(_cell(have, out, name, "bridge_coupled", label, label, command))
    return [cell for cell in cells if cell is not None]


def _differences(groups: Sequence[Group], out: Path, variant: str, others: Sequence[str]) -> dict[str, Difference]:
    """How much more of the gap a variant recovers than others do, on the seeds that both have."""
    found: dict[str, Difference] = {}
    for other in others:
        have = [group for group in groups if done(group, other, out)]
        sides = [
            [answers(out / group.name / slug(name), model) for group in have]
            for name, model in (
                (variant, "large_plugged"), (other, "large_plugged"),
                (groups[0].variants[0][0], "small_tuned"), (groups[0].variants[0][0], "large_tuned"),
            )
        ]  # fmt: skip
        if have and all(side is not None for column in sides for side in column):
            between = difference(*([np.asarray(a, dtype=float) for a in column] for column in sides))
            if between is not None:
                found[other] = between
    return found


def _cell(
    groups: Sequence[Group], out: Path, variant: str, model: str, title: str, control: str | None, command: str
) -> Cell | None:
    roots = [out / group.name / slug(variant) for group in groups]
    first = [out / group.name / slug(group.variants[0][0]) for group in groups]
    right = [answers(root, model) for root in roots]
    small = [answers(root, "small_tuned") for root in first]
    large = [answers(root, "large_tuned") for root in first]
    if any(a is None for a in (*right, *small, *large)):
        return None
    table = [[np.asarray(a, dtype=float) for a in column] for column in (right, small, large)]
    value, low, high, pgr, pgr_low, pgr_high = intervals(*table)
    config = None if model in REFERENCES else resolve(dict(groups[0].variants)[variant])
    bridge = config is not None and "prune" in stages_of(config)
    pruned = facts_of(roots[0], "prune") if bridge else {}
    majority = facts_of(first[0], "evaluate")["majority"]["metrics"]
    coupled = [read_marker(root / "couple") for root in roots]
    costs = [marker for marker in coupled if marker is not None] if config is not None else []
    return Cell(
        family=groups[0].pair,
        method=groups[0].method,
        mode=config.couple.mode if config is not None else "none",
        bridge_share=float(pruned["bridge_share"]) if bridge else None,
        bits=int(pruned["bits"]) if bridge else None,
        bridge_bytes_share=float(pruned["bridge_bytes_share"]) if bridge else None,
        down=config.prune.channels if config is not None and bridge else None,
        start=config.couple.plug if config is not None else None,
        task=groups[0].task,
        seeds=[group.seed for group in groups],
        metric="accuracy",
        value=value,
        low=low,
        high=high,
        pgr=pgr,
        pgr_low=pgr_low,
        pgr_high=pgr_high,
        control=control,
        command=f"{command} --only {groups[0].pair}-{groups[0].method}-{groups[0].task}-s",
        variant=title,
        n=len(table[0][0]),
        majority=float(majority["accuracy"]),
        commits=commits_of_run(first[0]),
        split=dict(groups[0].variants)[groups[0].variants[0][0]].evaluate.split,
        large_rows=_rows_read(roots[0], config, costs) if config is not None and costs else None,
        seconds=float(np.mean([m["seconds"] for m in costs])) if costs else None,
        peak_bytes=max(int(m["peak_bytes"]) for m in costs) if costs else None,
    )


def _rows_read(root: Path, config: RunConfig, couplings: Sequence[dict[str, Any]]) -> int:
    """Rows that the large model read: to choose the Bridge's units, repair it, and (their mean) start and couple."""
    bridge = "prune" in stages_of(config)
    rows = rows_scored(config.score.importance, int(facts_of(root, "score")["samples"])) if bridge else 0
    rows += round(float(np.mean([coupling["facts"]["large_rows"] for coupling in couplings])))
    if bridge and config.repair is not None:
        rows += config.repair.steps * config.repair.batch_size
    return rows


def intervals(
    right: Sequence[NDArray[np.float64]], small: Sequence[NDArray[np.float64]], large: Sequence[NDArray[np.float64]]
) -> tuple[float, float, float, float | None, float | None, float | None]:
    """(accuracy, low, high, PGR, low, high) from each seed's right (1) and wrong (0) answers.

    PGR is of the mean accuracies; None as `_share` says.
    """
    means = _resampled((right, small, large))
    value, base, top = (float(np.mean([a.mean() for a in side])) for side in (right, small, large))
    low, high = (float(q) for q in np.percentile(means[:, 0], [2.5, 97.5]))
    pgr = _share(value - base, top - base, means[:, 0] - means[:, 1], means[:, 2] - means[:, 1])
    return (value, low, high, None, None, None) if pgr is None else (value, low, high, *pgr)


def difference(
    right: Sequence[NDArray[np.float64]],
    other: Sequence[NDArray[np.float64]],
    small: Sequence[NDArray[np.float64]],
    large: Sequence[NDArray[np.float64]],
) -> Difference | None:
    """(PGR of one model minus that of another, low, high), from their answers to the same rows with the same seeds.

    What both share, the gap and how hard a row is, is no part of the doubt. None as `_share` says.
    """
    means = _resampled((right, other, small, large))
    a, b, base, top = (float(np.mean([x.mean() for x in side])) for side in (right, other, small, large))
    return _share(a - b, top - base, means[:, 0] - means[:, 1], means[:, 3] - means[:, 2])


def _share(part: float, gap: float, parts: NDArray[np.float64], gaps: NDArray[np.float64]) -> Difference | None:
    """(part / gap, low, high) from both as they are and as they were resampled.

    None where the gap is not above zero in at least 97.5 % of the resamples: a ratio to a gap that may not be there
    says nothing; those in which it is not are left out.
    """
    there = gaps > 0
    if float(np.mean(there)) < 0.975 or gap <= 0:
        return None
    low, high = (float(q) for q in np.percentile(parts[there] / gaps[there], [2.5, 97.5]))
    return part / gap, low, high


def _resampled(sides: Sequence[Sequence[NDArray[np.float64]]]) -> NDArray[np.float64]:
    """Mean accuracies of several models, resampled: (resamples, models).

    Each resample draws seeds, and test rows, the same for all models of all drawn seeds: every seed scores the same
    rows, so that a row's own difficulty does not average out over seeds. One seed fewer is drawn than there are (Rao
    and Wu 1988): as many would make the variance between seeds too small, with three by a third.
    """
    rng = np.random.default_rng(0)
    table = np.stack([np.stack(list(side)) for side in sides])  # models, seeds, rows
    models, count, rows = table.shape
    means = np.empty((RESAMPLES, models))
    for i in range(RESAMPLES):
        seeds = rng.integers(count, size=max(1, count - 1))
        means[i] = table[:, :, rng.integers(rows, size=rows)][:, seeds].mean((1, 2))
    return means


def write_cells(cells: Sequence[Cell], path: Path) -> None:
    """The cells as one JSON list."""
    rows: list[dict[str, Any]] = [asdict(cell) for cell in cells]
    write_json(path, rows)
