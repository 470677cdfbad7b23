"""A plan: every stage of a run and, beside it, other ways to tune the same large model."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from plugbridge.config import RunConfig
from plugbridge.cost import baseline_memory
from plugbridge.memory.predict import Trace
from plugbridge.memory.rates import Rates, primitive_bytes, rates_for, seconds_of
from plugbridge.memory.warm import warm_up
from plugbridge.models import pick_dtype
from plugbridge.plan.advice import Advice, Faster, advise, faster, left_out, streams_here
from plugbridge.plan.faithful import Faithful, most_faithful
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import REFERENCE, Work, on_card, peak_of, references_of, rivals_of, subjects_of, works_of
from plugbridge.preflight import with_commits
from plugbridge.progress import Progress
from plugbridge.sources import commits_of
from plugbridge.stages.room import WIDE, trained_bytes


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    A `reference` is no part of the transfer. `peak_bytes` holds model and optimizer, `disk_bytes` is the most that the
    stage has on disk, step checkpoints included; `read_bytes` what it reads of a streamed model, which is not in the
    `seconds`. `large_rows` are the rows that the large model reads, `passes` its forward passes. `fits` is None where
    no memory was given. `note` says what is not exact.
    """

    name: str
    ours: bool
    reference: bool
    peak_bytes: int
    seconds: float
    disk_bytes: int
    read_bytes: int
    passes: int
    large_rows: int
    fits: bool | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All stages and baselines; `advice` where the run does not fit in the memory given, which holds more than Python.

    `rates` by precision are those of `device`, where the run would go on here, with so many `threads` on a processor.
    `baseline` is what a process with all libraries takes before any model (0 on a card): stages have what it leaves of
    `memory`. `left_out` are settings that leave out references which do not fit, even with what is advised; `faster`
    what saves time with the memory that is left; `faithful` the most faithful way to train the module in it.
    """

    stages: list[PlannedStage]
    rates: dict[str, Rates]
    device: str
    threads: int
    large_parameters: int
    length: int
    memory: int | None
    baseline: int
    advice: Advice | None
    left_out: tuple[str, ...] = ()
    faster: Faster | None = None
    commits: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of models from the hub, by size: `config.json` was read of these."""
    faithful: Faithful | None = None

    @property
    def peak(self) -> PlannedStage:
        """Our stage with the largest peak."""
        return max((stage for stage in self.stages if stage.ours), key=lambda stage: stage.peak_bytes)

    @property
    def whole(self) -> PlannedStage:
        """All our stages' lines together: the largest peak, the sums of everything else."""
        ours = [stage for stage in self.stages if stage.ours]
        return PlannedStage(
            "all of the above",
            ours=True,
            reference=False,
            peak_bytes=self.peak.peak_bytes,
            seconds=sum(stage.seconds for stage in ours),
            disk_bytes=sum(stage.disk_bytes for stage in ours),
            read_bytes=sum(stage.read_bytes for stage in ours),
            passes=sum(stage.passes for stage in ours),
            large_rows=sum(stage.large_rows for stage in ours),
            fits=None if self.memory is None else all(stage.fits for stage in ours),
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        return asdict(self) | {"whole": asdict(self.whole)}


def make_plan(
    config: RunConfig,
    length: int | None,
    memory: int | None,
    threads: int | None = None,
    beside: Executor | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Predict every stage of a run and the baselines, for rows of `length` tokens or as many as a run may give models.

    Predictions are made on `beside`, too, where it is given. Rates are those of so many `threads`, a run's own unless
    told. Raises as `prepare` does for settings that do not go together.
    """
    config = with_commits(config)
    threads = torch.get_num_threads() if threads is None else threads
    dtype = pick_dtype(config.dtype)
    baseline = 0 if on_card(config) else _baseline(dtype)
    predictions = Predictions(beside, primitive_bytes("cuda" if on_card(config) else "cpu", [dtype]))
    room = None if memory is None else max(0, memory - baseline)
    subjects = subjects_of(config, length, room)
    length = subjects.large.length
    works = [*works_of(subjects), *references_of(subjects), *rivals_of(subjects)]
    traces = predictions.all([work.row for work in works], progress)
    device = "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"
    rates = rates_for((work.row.case for work in works), device, threads)  # while nothing else is at work
    stages = [_planned(work, trace, rates, room) for work, trace in zip(works, traces, strict=True)]
    tight = {stage.name: stage.peak_bytes for stage in stages if stage.ours and stage.fits is False}
    wanted = bool(room) and (bool(tight) or streams_here(config, length, room))
    advice = advise(config, length, room, tight, predictions) if room and wanted else None
    by_name = {str(number).removeprefix("torch."): rate for number, rate in rates.items()}
    out = left_out(config, advice, length, room, predictions) if room else ()
    quick = faster(config, advice, length, room, rates, predictions) if room else None
    ours = list(zip(works, traces, strict=True))[: sum(stage.ours for stage in stages)]
    way = most_faithful(config, length, ours, room, rates, predictions) if room else None
    commits = commits_of(config.small, config.large_path)
    return Plan(
        stages, by_name, device, threads, subjects.parameters, length, memory, baseline, advice, out, quick, commits,
        way,
    )  # fmt: skip


def _baseline(dtype: torch.dtype) -> int:
    """What a stage's process holds before any model."""
    warm_up(dtype)
    return baseline_memory()


def _planned(work: Work, counts: Trace, rates: Mapping[torch.dtype, Rates], room: int | None) -> PlannedStage:
    each = WIDE if work.training is None else trained_bytes(work.training, work.width)
    disk = work.disk + each * counts.trained
    peak = peak_of(work, counts)
    before = {"": "", REFERENCE: "reference: "}.get(work.row.stage, "large: ")
    return PlannedStage(
        f"{before}{work.row.method}", work.row.stage == "", work.row.stage == REFERENCE, peak,
        work.times * seconds_of(counts, rates), round(disk),
        round(counts.read * (work.times if work.sweeps is None else work.sweeps)), work.passes, work.large_rows,
        None if room is None else peak <= room, work.note,
    )  # fmt: skip
