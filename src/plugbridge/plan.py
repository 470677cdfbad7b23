"""What a run would take, from the models' configuration files alone: nothing is loaded, nothing is run.

Every stage is predicted as `memory.predict` does, and beside it other ways to tune the same large model.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from plugbridge.config import RunConfig
from plugbridge.cost import free_memory
from plugbridge.errors import ConfigError
from plugbridge.memory.case import Case
from plugbridge.memory.packed import BITS
from plugbridge.memory.predict import Trace, predict
from plugbridge.memory.rates import Rates, measure_rates
from plugbridge.memory.rows import Row, baselines, top_layers
from plugbridge.memory.steps import STEPS
from plugbridge.models import check_pair, load_config, parameter_count, pick_device, pick_dtype
from plugbridge.prepare import bridge_sizes, resolve, wants_streaming
from plugbridge.shrink.prune import count_parameters
from plugbridge.stages.shrink import rows_at_once
from plugbridge.streaming import block_bytes
from plugbridge.transfer.couple import find_mode
from plugbridge.tuners.table import MethodSettings, find_method


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    `peak_bytes` holds model and optimizer, `disk_bytes` is what the stage leaves and, where it trains, its step
    checkpoint. `large_rows` are the rows that the large model reads, `passes` its forward passes. `fits` is None where
    no memory was given.
    """

    name: str
    ours: bool
    peak_bytes: int
    seconds: float
    disk_bytes: int
    passes: int
    large_rows: int
    fits: bool | None


@dataclass(frozen=True)
class Advice:
    """`settings` with which all our stages fit; or a stage that is `stuck`, which none of those tried makes fit."""

    settings: tuple[str, ...]
    stuck: str | None = None


@dataclass(frozen=True)
class Plan:
    """All stages and baselines; `advice` where memory was given and the run does not fit in it."""

    stages: list[PlannedStage]
    rates: Rates
    large_parameters: int
    length: int
    memory: int | None
    advice: Advice | None

    @property
    def peak(self) -> PlannedStage:
        """Our stage with the largest peak."""
        return max((stage for stage in self.stages if stage.ours), key=lambda stage: stage.peak_bytes)

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """How often a stage's step is done, what it leaves on disk, and how it reads the large model."""

    row: Row
    times: float
    disk: float
    passes: int
    large_rows: int


@dataclass(frozen=True)
class Subjects:
    """A configuration met with the shapes of its models; `at_once` is of a streamed model that is scored."""

    config: RunConfig
    small: Case
    large: Case
    at_once: int
    parameters: int
    bridge: int
    hidden: int


def make_plan(config: RunConfig, length: int, memory: int | None, threads: int) -> Plan:
    """Predict every stage of a run and the baselines, for rows of `length` tokens. Raises as `prepare` does."""
    subjects = subjects_of(config, length, memory)
    rates = measure_rates(subjects.large.dtype, "cpu", threads)
    works = list(works_of(subjects))
    known: dict[Any, Trace] = {}
    ours = [_planned(work, _predict(work.row, known), rates, memory) for work in works]
    others = [_planned(work, _predict(work.row, known), rates, memory) for work in rivals_of(subjects)]
    tight = {work.row.method: stage.peak_bytes for work, stage in zip(works, ours, strict=True) if stage.fits is False}
    advice = advise(config, length, memory, tight, known) if memory is not None and tight else None
    return Plan([*ours, *others], rates, subjects.parameters, length, memory, advice)


def _predict(row: Row, known: dict[Any, Trace]) -> Trace:
    """A row's prediction; equal cases are traced once."""
    key = (id(row.make), repr(row.case))
    if key not in known:
        known[key] = predict(row.case, row.make)
    return known[key]


def subjects_of(config: RunConfig, length: int, memory: int | None) -> Subjects:
    """Read both models' configuration files and size the Bridge. Raises ConfigError or ModelError.

    Whether the large model is streamed is as the run would decide, with `memory` free, or what is free here.
    """
    config, method = resolve(config), find_method(config.method.name)
    remote = config.trust_remote_code
    small, large = (load_config(path, trust_remote_code=remote) for path in (config.small, config.large_path))
    check_pair(small, large)
    rank = config.method.rank if config.method.rank is not None else method.rank
    settings = MethodSettings(rank, config.method.alpha or 2.0 * rank, config.method.dropout)
    base = Case(
        large, config.couple.batch_size, length, dtype=pick_dtype(config.dtype), method=method, settings=settings,
        channels=config.prune.channels, importance=config.score.importance, bits=config.load_in,
        train_bridge=config.couple.bridge == "train", recompute=config.couple.recompute,
    )  # fmt: skip
    empty, layout = base.on_meta()
    sizes = bridge_sizes(config, empty, layout)
    names = {name for name, _ in empty.named_parameters()}
    assert config.couple.layers is not None  # resolved
    free = memory if memory is not None else free_memory(pick_device(config.device))
    at_once = rows_at_once(layout, length, base.dtype, block_bytes(empty, layout))
    large_case = replace(
        base, sizes=sizes, trained=top_layers(base.layers, config.couple.layers),
        streamed=wants_streaming(config, parameter_count(empty), free),
        micro_batch=config.couple.micro_batch,
    )  # fmt: skip
    return Subjects(
        config,
        replace(base, config=small, batch=config.tune.batch_size, bits=None, micro_batch=config.tune.micro_batch),
        large_case,
        0 if config.score.keep == "disk" else min(at_once, config.score.samples),
        parameter_count(empty),
        count_parameters(layout, names, sizes),
        layout.sizes["hidden"],
    )


def works_of(s: Subjects) -> Iterator[Work]:
    """Our stages in order. Stages that read the full weights do so whatever `load_in` says."""
    config, hidden = s.config, s.hidden
    full = replace(s.large, bits=None, trained={})
    coupled = s.large if s.large.bits is None else replace(s.large, streamed=False)
    large = replace(coupled, trained={})  # all layers are alike where none is left out
    samples, width = config.score.samples, large.dtype.itemsize
    yield Work(Row("tune (small)", "", s.small, STEPS["tuned"]), config.tune.steps, 0, 0, 0)
    moments = 8 * hidden * hidden * (2 if config.score.importance == "fisher" else 1)
    scored = replace(full, at_once=s.at_once) if full.streamed else full
    reads = 1 + max(1, scored.at_once) if full.streamed else 1  # rows of one repetition
    states = 0
    if full.streamed and s.at_once == 0:  # a row leaves one at every block
        states = samples * full.length * hidden * width * sum(full.layers.values())
    disk = moments + states
    yield Work(Row("score", "", scored, STEPS["score"]), samples / reads, disk, 2 * samples, 2 * samples)
    yield Work(Row("prune", "", full, STEPS["prune"]), 1, s.bridge * width, 0, 0)
    if config.repair is not None:
        case, steps = replace(large, batch=config.repair.batch_size, micro_batch=None), config.repair.steps
        row = Row("repair", "", case, STEPS["repair"])
        yield Work(row, steps, s.bridge * 4, steps, steps * case.batch)
    steps = config.couple.steps
    runs = steps if find_mode(config.couple.mode).runs_large else 0
    row = Row(f"couple ({config.couple.mode})", "", coupled, STEPS[f"couple, {config.couple.mode}"])
    yield Work(row, steps, 0, runs, runs * coupled.batch)
    if config.polish is not None:
        rows, batch = config.polish.evaluations * config.polish.rows, config.polish.batch_size
        times = config.polish.evaluations * math.ceil(config.polish.rows / batch)
        yield Work(Row("polish", "", replace(large, batch=batch), STEPS["polish"]), times, 0, times, rows)
    row = Row("evaluate (a batch)", "", replace(large, batch=config.evaluate.batch_size), STEPS["evaluate"])
    yield Work(row, 1, 0, 1, row.case.batch)


def rivals_of(s: Subjects) -> Iterator[Work]:
    """Other ways to tune the large model, with as many steps on batches of the same size."""
    case, steps = replace(s.large, bits=None, trained={}, streamed=False, micro_batch=None), s.config.couple.steps
    for row in baselines(case):
        yield Work(row, steps, 0, steps, steps * case.batch)


def _planned(work: Work, counts: Trace, rates: Rates, memory: int | None) -> PlannedStage:
    disk = work.disk + 12 * counts.trained  # the step checkpoint: parameters and AdamW's two moments
    name = f"{work.row.method}" if work.row.stage == "" else f"large: {work.row.method}"
    return PlannedStage(
        name, work.row.stage == "", counts.peak, work.times * rates.seconds(counts), round(disk), work.passes,
        work.large_rows, None if memory is None else counts.peak <= memory,
    )  # fmt: skip


LARGE = ("score", "prune", "repair", "couple", "polish", "evaluate")
CHANGES: tuple[tuple[str, dict[str, dict[str, Any]], tuple[str, ...]], ...] = (
    ("resident: none", {"": {"resident": "none"}}, LARGE),
    ("score.keep: disk", {"score": {"keep": "disk"}}, ("score",)),
    ("tune.micro_batch: 1", {"tune": {"micro_batch": 1}}, ("tune",)),
    ("couple.recompute: true", {"couple": {"recompute": True}}, ("couple",)),
    ("couple.micro_batch: 1", {"couple": {"micro_batch": 1}}, ("couple",)),
    ("evaluate.batch_size: 1", {"evaluate": {"batch_size": 1}}, ("evaluate",)),
    (
        "score.importance: activation, prune.channels: auto",
        {"score": {"importance": "activation"}, "prune": {"channels": "auto"}},
        ("score",),
    ),
    (
        "score.importance: magnitude, prune.channels: auto",
        {"score": {"importance": "magnitude"}, "prune": {"channels": "auto"}},
        ("score",),
    ),
    ("dtype: bfloat16", {"": {"dtype": "bfloat16"}}, ("tune", *LARGE)),
    ("large.load_in: 4bit", {"large": {"load_in": "4bit"}}, ("repair", "couple", "polish", "evaluate")),
    ("prune.reduction: 8", {"prune": {"reduction": 8}}, ("prune", "repair", "couple")),
    ("prune.budget: 0.02", {"prune": {"budget": 0.02}}, ("prune", "repair", "couple")),
)
"""Settings that save memory, those first that change no result, with the stages that they concern."""


def advise(
    config: RunConfig, length: int, memory: int, tight: dict[str, int], known: dict[Any, Trace] | None = None
) -> Advice:
    """The first settings, each added to those before it that help, with which all our stages fit.

    `tight` are the peaks of the stages that do not fit, `known` what was predicted before. The search ends with the
    first stage that is left without a setting to try.
    """
    known = {} if known is None else known
    chosen: list[str] = []
    for number, (text, change, _) in enumerate(CHANGES):
        over = [name for name, peak in tight.items() if peak > memory]
        if (stuck := _stuck(config, over, number)) is not None:
            return Advice((), stuck)
        names = [name for name in over if _may_help(config, name, number)]
        if not names:
            continue
        tried = changed(config, change)
        try:
            subjects = subjects_of(tried, length, memory)
            works = [work for work in works_of(subjects) if work.row.method in names]
        except ConfigError:  # such as a Bridge too small for the model's heads
            continue
        if tried.load_in is not None and subjects.parameters * BITS[tried.load_in] / 8 > memory:
            continue  # the weights alone do not fit: nothing to trace
        peaks = {work.row.method: _predict(work.row, known).peak for work in works}
        if any(peak < 0.98 * tight[name] for name, peak in peaks.items()):
            config, tight, chosen = tried, {**tight, **peaks}, [*chosen, text]
        if all(peak <= memory for peak in tight.values()):
            return Advice(tuple(chosen))
    return Advice((), next(name for name, peak in tight.items() if peak > memory))


def _stuck(config: RunConfig, over: list[str], number: int) -> str | None:
    """The first stage that neither this change nor a later one may help."""
    later = range(number, len(CHANGES))
    return next((name for name in over if not any(_may_help(config, name, at) for at in later)), None)


def _may_help(config: RunConfig, name: str, number: int) -> bool:
    """Whether a change concerns a stage and changes anything; quantised weights do not stream."""
    _, change, concerns = CHANGES[number]
    if not name.startswith(concerns):
        return False
    try:
        tried = changed(config, change)
    except ConfigError:  # such as a budget beside the reduction that is asked for
        return False
    return tried != changed(config, {}) and (tried.resident != "none" or tried.load_in is None)


def changed(config: RunConfig, change: dict[str, dict[str, Any]]) -> RunConfig:
    """A configuration with some keys changed, by section."""
    raw = config.model_dump()
    if isinstance(raw["large"], str):
        raw["large"] = {"path": raw["large"]}
    for section, keys in change.items():
        (raw if section == "" else raw[section]).update(keys)
    try:
        return RunConfig.model_validate(raw)
    except ValueError as error:  # keys that were checked one by one
        raise ConfigError(f"{', '.join(change)}: not usable together with this configuration") from error
