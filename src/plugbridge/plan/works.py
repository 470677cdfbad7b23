"""A run's stages as steps that can be traced, and how often each is done."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from plugbridge.config import RunConfig, TrainConfig
from plugbridge.config.stages import PartsConfig
from plugbridge.cost import free_memory
from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout, family_of
from plugbridge.memory.case import Case
from plugbridge.memory.predict import Trace
from plugbridge.memory.rows import Row, baselines, top_layers
from plugbridge.memory.steps import STEPS, alignment
from plugbridge.models import check_pair, load_config, parameter_count, pick_device, pick_dtype, positions_of
from plugbridge.preflight import check_settings, check_task, resolve, room_in, too_many
from plugbridge.prepare import bridge_sizes, wants_streaming
from plugbridge.shrink.sizes import count_bytes, count_parameters
from plugbridge.shrink.vectors import vector_bytes
from plugbridge.stages.depends import alignment_passes
from plugbridge.stages.room import WIDE, kept_numbers
from plugbridge.stages.shrink import rows_at_once, rows_scored
from plugbridge.streaming import block_bytes
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.ladder import length_in
from plugbridge.transfer.needed import needs_bridge, passing, stages_of
from plugbridge.tuners.table import MethodSettings, find_method

FULL = "full fine-tuning"
BY_BLOCKS = "tuned, by blocks"
REFERENCE = "reference"
"""The stage of rows that a run makes only to compare with."""
AT_MOST = "cached activations, passes and large rows are at most these: a row that comes again is not read again"
LARGE_MODELS = {"large_zero_shot", "large_plugged"}
"""What `evaluate` scores of the large model itself, references left out."""
LENGTH = 512
"""Tokens of a row where nothing is said and the models' positions hold them."""


@dataclass(frozen=True)
class Work:
    """How often a stage's step is done, what it has on disk beside what trains, and how it reads the large model.

    `kept` are bytes that gather in memory while it is done; `note` says what is not exact. What a repetition reads from
    disk is read `sweeps` times, as often as it is done where that is None. What trains does as `training` says, and its
    numbers are of `width` bytes.
    """

    row: Row
    times: float
    disk: float
    passes: int
    large_rows: int
    kept: float = 0
    note: str = ""
    sweeps: float | None = None
    training: TrainConfig | None = None
    width: int = WIDE


def peak_of(work: Work, counts: Trace) -> int:
    """The most bytes that a stage has in memory, given its step's counts."""
    return counts.peak + round(work.kept)


@dataclass(frozen=True)
class Subjects:
    """A configuration met with the shapes of its models; `at_once` is of a streamed model that is scored.

    `bridge` counts the Bridge's parameters, `bridge_bytes` what it takes on disk, and `bridge_frozen` what it takes
    once more where coupling writes it as it is.
    """

    config: RunConfig
    layout: Layout
    small: Case
    large: Case
    at_once: int
    parameters: int
    bridge: int
    bridge_bytes: int
    bridge_frozen: int
    hidden: int


def subjects_of(config: RunConfig, length: int | None, memory: int | None) -> Subjects:
    """Read both models' configuration files and size the Bridge. Raises ConfigError or ModelError.

    Settings are checked as the run checks them. Whether the large model is streamed is as the run would decide, with
    `memory` free, or what is free here. Without a `length`, rows are as `_length` says.
    """
    method, config = find_method(config.method.name), resolve(config)
    check_settings(config)
    remote = config.trust_remote_code
    small, large = (load_config(path, trust_remote_code=remote) for path in (config.small, config.large_path))
    check_pair(small, large)
    check_task(config, family_of(large.model_type).kind)
    length = _length(config, length, small, large)
    rank = config.method.rank if config.method.rank is not None else method.rank
    settings = MethodSettings(rank, config.method.alpha or 2.0 * rank, config.method.dropout)
    assert config.couple.optimizer is not None  # resolved
    base = Case(
        large, config.couple.batch_size, length, dtype=pick_dtype(config.dtype), method=method, settings=settings,
        channels=config.prune.channels, importance=config.score.importance, bits=config.load_in,
        train_bridge=config.couple.bridge == "train", recompute=config.couple.recompute,
        optimizer=config.couple.optimizer, down=config.couple.down, packed=config.prune.weight_bits,
        activations=config.couple.activations or "bridge",
        kept_bits=config.couple.kept_bits, bridge_streamed=not config.couple.bridge_resident,
    )  # fmt: skip
    empty, layout = base.on_meta()
    sizes = bridge_sizes(config, empty, layout)
    names = {name for name, _ in empty.named_parameters()}
    assert config.couple.layers is not None  # resolved
    free = memory if memory is not None else free_memory(pick_device(config.device))
    at_once = rows_at_once(layout, length, base.dtype, block_bytes(empty, layout))
    large_case = replace(
        base, sizes=sizes, trained=top_layers(base.layers, config.couple.layers),
        streamed=streamable(config) and wants_streaming(config, parameter_count(empty), free),
        micro_batch=config.couple.micro_batch,
    )  # fmt: skip
    return Subjects(
        config,
        layout,
        replace(
            base.alone(),
            config=small,
            batch=config.tune.batch_size,
            bits=None,
            micro_batch=config.tune.micro_batch,
            optimizer=config.tune.optimizer,
        ),
        large_case,
        0 if config.score.keep == "disk" else min(at_once, config.score.samples),
        parameter_count(empty),
        count_parameters(layout, names, sizes),
        count_bytes(layout, names, sizes, config.prune.weight_bits, base.dtype.itemsize),
        count_bytes(layout, names, sizes, config.prune.weight_bits, WIDE),
        layout.sizes["hidden"],
    )


def streamable(config: RunConfig) -> bool:
    """Whether the large model can be streamed: not from pickles alone; what is not here yet may be."""
    folder = Path(config.large_path)
    return any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))


def _length(config: RunConfig, asked: int | None, small: PreTrainedConfig, large: PreTrainedConfig) -> int:
    """Tokens of a row: as asked, or `LENGTH`, or what `max_length` and both models' positions leave of them."""
    models = {config.small: small, config.large_path: large}
    rooms = {source: room_in(config, positions_of(model)) for source, model in models.items()}
    if asked is None:
        return min([LENGTH, *(room for room in rooms.values() if room is not None)])
    for source, room in rooms.items():
        if room is not None and asked > room:
            raise ConfigError(too_many(asked, room, source))
    return asked


def works_of(s: Subjects) -> Iterator[Work]:
    """Our stages that the run does, in order."""
    yield from (work for work in _works(s) if _stage_of(work) in stages_of(s.config))


def _stage_of(work: Work) -> str:
    """The run's stage that a step is part of."""
    return work.row.method.partition(":")[0].partition(" ")[0]


def _works(s: Subjects) -> Iterator[Work]:
    """All our stages. Those that read the full weights do so whatever `load_in` says."""
    config, hidden = s.config, s.hidden
    full = replace(s.large.alone(), bits=None)
    coupled = s.large if s.large.bits is None else replace(s.large, streamed=False)
    large = coupled.alone()
    bridged = replace(large, sizes=s.large.sizes)
    samples, width = config.score.samples, large.dtype.itemsize
    yield Work(Row("tune (small)", "", s.small, STEPS["tuned"]), config.tune.steps, 0, 0, 0, training=config.tune)
    yield _validation("tune", "", s, s.small)
    moments = 8 * hidden * hidden * (2 if config.score.importance == "fisher" else 1)
    scored, reads = _scored(s, full)
    states = 0
    if full.streamed and s.at_once == 0:  # a row leaves one at every block
        (row,) = full.rows(1)
        states = samples * width * kept_numbers(s.layout, row, full.kind)
    disk = moments + states + vector_bytes(s.layout, passing(config), samples)
    passes = rows_scored(config.score.importance, samples)
    yield Work(
        Row("score", "", scored, STEPS["score"]), samples / reads, disk, passes, passes, sweeps=_sweeps(s, samples)
    )
    pruned = replace(full, sizes=s.large.sizes, packed=config.prune.weight_bits)
    yield Work(Row("prune", "", pruned, STEPS["prune"]), 1, s.bridge_bytes, 0, 0)
    if config.repair is not None:
        steps, asked = config.repair.steps, config.repair
        case = replace(bridged, batch=asked.batch_size, optimizer=asked.optimizer, target=asked.target)
        row = Row("repair", "", case, STEPS["repair"])
        yield Work(row, steps, 0, steps, steps * case.batch, training=asked)
    steps = config.couple.steps
    mode = find_mode(config.couple.mode)
    runs = steps * mode.passes if mode.runs_large else 0
    case = replace(coupled, small=None if config.couple.plug == "fresh" else s.small.config, together=mode.exact)
    aligned = config.couple.align_samples * alignment_passes(config)
    if aligned:
        assert config.couple.plug is not None  # resolved
        step = STEPS[alignment(config.couple.plug, config.couple.layer_map)]
        start = replace(large, small=s.small.config)
        yield Work(
            Row("couple: start from both models' states", "", start, step),
            config.couple.align_samples,
            0,
            aligned,
            aligned,
        )
    row = Row(f"couple ({config.couple.mode})", "", case, STEPS[f"couple, {config.couple.mode}"])
    rows = runs * coupled.batch
    disk, kept = (_cache_bytes(s, rows) if config.couple.cache == kind else 0 for kind in ("disk", "memory"))
    note = AT_MOST if disk or kept else ""
    if mode.trains_bridge and config.couple.bridge == "freeze":
        disk += s.bridge_frozen  # which is written all the same
    if steps > 0 or needs_bridge(config):  # else the module is plugged in as it is
        yield Work(row, steps, disk, runs, rows, 0 if on_card(config) else kept, note, training=config.couple)
    if config.polish is not None:
        rows, batch = config.polish.evaluations * config.polish.rows, config.polish.batch_size
        times = config.polish.evaluations * math.ceil(config.polish.rows / batch)
        yield Work(Row("polish", "", replace(large, batch=batch), STEPS["polish"]), times, 0, times, rows)
    if not on_card(config):  # which it never uses
        folded = replace(large, small=case.small, streamed=False)
        yield Work(Row("plug", "", folded, STEPS["plug"]), 1, 0, 0, 0)
    yield from _evaluations(s, large, bridged)


def _evaluations(s: Subjects, large: Case, bridged: Case) -> Iterator[Work]:
    """What scoring the models takes: all rows where `evaluate.limit` says how many, else a batch of them.

    A model that is not scored is left out, and so are the small ones where the small model is tuned, which takes more.
    """
    config, batch = s.config.evaluate, s.config.evaluate.batch_size
    names = config.models if config.models is not None else [*LARGE_MODELS, "bridge_coupled", "large_proxy"]
    batches = 1 if config.limit is None else math.ceil(config.limit / batch)
    rows, much = (batch, " (a batch)") if config.limit is None else (config.limit, "")
    note = "" if config.limit is None else "as many rows as evaluate.limit says, if there are so many"
    row = Row(f"evaluate{much}", "", replace(large, batch=min(batch, rows)), STEPS["evaluate"])
    if any(name.startswith("large_") and name != "large_proxy" for name in names):
        scored = 1 if config.limit is None else max(1, len(LARGE_MODELS & set(names)))
        yield Work(row, scored * batches, 0, scored * batches, scored * rows, note=note)
    elif "tune" not in stages_of(s.config):
        yield Work(replace(row, case=replace(s.small.alone(), batch=min(batch, rows))), batches, 0, 0, 0, note=note)
    if config.proxy and "large_proxy" in names:
        case = replace(large, small=s.small.config, batch=row.case.batch)
        row = Row(f"evaluate: large_proxy{much}", "", case, STEPS["evaluate, proxy"])
        yield Work(row, batches, 0, batches, rows, note=note)
    mode = find_mode(s.config.couple.mode)
    if mode.trains_bridge and "bridge_coupled" in names:
        step = STEPS["evaluate, ladder" if mode.runs_large else "evaluate, bridge"]
        row = Row(f"evaluate: bridge_coupled{much}", "", replace(bridged, batch=row.case.batch), step)
        yield Work(row, batches, 0, batches * mode.runs_large, rows * mode.runs_large, note=note)


def _scored(s: Subjects, case: Case) -> tuple[Case, int]:
    """A case to be scored, and the rows that one repetition reads."""
    return (replace(case, at_once=s.at_once), 1 + max(1, s.at_once)) if case.streamed else (case, 1)


def _sweeps(s: Subjects, samples: int) -> float:
    """How often scoring's repetition is read from disk: it has two sweeps, or one where all rows are swept at once."""
    return 1 if s.at_once == 0 else math.ceil(samples / s.at_once) / 2


def _cache_bytes(s: Subjects, rows: int) -> int:
    """Bytes of the activations of so many rows, if coupling may keep them."""
    places = find_mode(s.config.couple.mode).caches
    if places is None:
        return 0
    (row,) = s.large.rows(1)
    positions = sum(length_in(row, rung.partition(":")[0], s.large.kind) for rung in places(s.layout))
    return rows * positions * s.hidden * s.large.dtype.itemsize


def on_card(config: RunConfig) -> bool:
    """Whether the run's models are on a card: what is kept in the machine's memory is not counted beside them."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def references_of(s: Subjects) -> Iterator[Work]:
    """What a run makes only to compare with, where it is asked for."""
    yield from (work for work in _references(s) if _stage_of(work) in stages_of(s.config))


def _references(s: Subjects) -> Iterator[Work]:
    """All references that have a section; the large model of a ladder or the ceiling is streamed as the run's is."""
    cases = {"small": replace(s.small, micro_batch=None), "large": _resident(s)}
    if s.config.ceiling is not None:
        streams = s.large.streamed
        case = replace(cases["large"], streamed=streams, together=streams)
        yield _reference("ceiling", BY_BLOCKS if streams else "tuned", case, s.config.ceiling, large=True)
        yield _validation("ceiling", REFERENCE, s, case, large=True)
    for size, case in cases.items():
        finetuned = getattr(s.config.baselines, f"{size}_finetuned")
        if finetuned is not None:
            yield _reference(f"{size}_finetuned", FULL, case, finetuned, large=size == "large")
            yield _validation(f"{size}_finetuned", REFERENCE, s, case, large=size == "large")
        ladder = getattr(s.config.baselines, f"{size}_ladder")
        if ladder is not None:
            case = replace(case, streamed=size == "large" and s.large.streamed)
            side = replace(case, sizes=None, reduction=ladder.reduction)
            yield _reference(f"{size}_ladder", "ladder side-tuning", side, ladder, large=size == "large")
            yield _validation(f"{size}_ladder", REFERENCE, s, side, "evaluate, ladder", large=size == "large")
            scored, reads = _scored(s, case)
            row = Row(f"{size}_ladder: score", REFERENCE, scored, STEPS["score"])
            samples = s.config.score.samples
            yield Work(row, samples / reads, 0, 0, 0, sweeps=_sweeps(s, samples))


def _validation(name: str, stage: str, s: Subjects, case: Case, step: str = "evaluate", large: bool = False) -> Work:
    """A batch of the rows that a model is scored on when it is trained; how many there are is not known."""
    batch = s.config.evaluate.batch_size
    case = replace(case.alone(), batch=batch)
    return Work(Row(f"{name}: validation (a batch)", stage, case, STEPS[step]), 1, 0, int(large), batch * large)


def _reference(name: str, step: str, case: Case, settings: PartsConfig, large: bool) -> Work:
    steps = settings.steps
    case = replace(case, batch=settings.batch_size, micro_batch=settings.micro_batch, optimizer=settings.optimizer)
    row = Row(name, REFERENCE, case, STEPS[step])
    width = case.dtype.itemsize if step == FULL else WIDE
    return Work(row, steps, 0, steps * large, steps * case.batch * large, training=settings, width=width)


def _resident(s: Subjects) -> Case:
    return replace(s.large.alone(), bits=None, streamed=False)


def rivals_of(s: Subjects) -> Iterator[Work]:
    """Other ways to tune the large model, with as many steps on batches of the same size."""
    case, steps = _resident(s), s.config.couple.steps
    training = s.config.couple.model_copy(update={"optimizer": case.optimizer})
    for row in baselines(case):
        width = case.dtype.itemsize if row.method == FULL else WIDE
        yield Work(row, steps, 0, steps, steps * case.batch, training=training, width=width)
