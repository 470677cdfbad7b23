"""The stages of a run in order, with what each depends on."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from plugbridge.config import PartsConfig, RunConfig
from plugbridge.cost import baseline_memory, measure, return_blocks, settle
from plugbridge.errors import ModelError
from plugbridge.models import drops_out, load_config
from plugbridge.prepare import Prepared
from plugbridge.progress import Progress
from plugbridge.run import Stage, StageResult
from plugbridge.stages.baselines import climb, finetune
from plugbridge.stages.couple import couple
from plugbridge.stages.depends import Asked, Part, baselines_of, micro_batch_of, parts_of, seen
from plugbridge.stages.evaluate import evaluate
from plugbridge.stages.plug import plug, polish
from plugbridge.stages.repair import repair
from plugbridge.stages.room import baseline_room, bridge_room, couple_room, repair_room, score_room
from plugbridge.stages.shrink import prune, score
from plugbridge.stages.tune import ceiling, tune
from plugbridge.stages.work import Work
from plugbridge.transfer.couple import find_mode

Do = Callable[[Work], dict[str, Any]]
"""What a stage does; returns its facts."""
BIG = 2**26
"""Bytes of a large model from which memory matters more than the time that it takes to return it."""


def build_stages(prepared: Prepared, root: Path, progress: Progress, only: str | None = None) -> list[Stage]:
    """The stages of a run in order, with what each depends on: those that make the models to be scored.

    Where `only` one will be run, all that the configuration has.
    """
    baseline, here = baseline_memory(), os.getpid()  # libraries and rows are loaded, no model

    def stage(part: Part, work: Do, room: Callable[[], int] = lambda: 0) -> Stage:
        def measured(folder: Path) -> StageResult:
            if prepared.large_bytes >= BIG:
                return_blocks()
            if os.getpid() != here:  # a process of the stage's own, whose libraries are warm
                before = baseline_memory()
            else:
                before = baseline
                settle()
            with measure(prepared.device, before) as cost:
                facts = work(Work(prepared, root, folder, progress, cost))
            prepared.require_unchanged()
            return StageResult(facts, cost.seconds, cost.peak_bytes, cost.reserved_bytes)

        return Stage(part.name, part.needs, part.depends, measured, room)

    works = _works(prepared)
    return [stage(part, *works[part.name]) for part in parts_of(_asked(prepared), only)]


def _works(prepared: Prepared) -> dict[str, tuple[Do, Callable[[], int]]]:
    """Work and disk of every stage."""
    works: dict[str, tuple[Do, Callable[[], int]]] = {
        "tune": (tune, _none),
        "score": (score, partial(score_room, prepared)),
        "prune": (prune, partial(bridge_room, prepared)),
        "repair": (repair, partial(repair_room, prepared)),
        "couple": (couple, partial(couple_room, prepared)),
        "polish": (polish, _none),
        "plug": (plug, _none),
        "ceiling": (ceiling, _none),
        "evaluate": (evaluate, _none),
    }
    for name, size, kind, settings in baselines_of(prepared.config):
        work = finetune if kind == "finetuned" else climb
        works[name] = (partial(work, size=size), partial(baseline_room, prepared, size, kind, settings))
    return works


def _none() -> int:
    return 0


def _asked(prepared: Prepared) -> Asked:
    """All that the stages of a prepared run depend on."""
    remote = prepared.config.trust_remote_code
    return Asked(
        prepared.config, prepared.method, prepared.settings, prepared.device, prepared.inputs,
        lambda source: drops_out(load_config(source, trust_remote_code=remote)),
    )  # fmt: skip


def same_result(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations differ in nothing but keys that change no result."""
    if seen(one.model_dump(mode="json")) != seen(other.model_dump(mode="json")):
        return False
    return _rows_at_a_time(one) == _rows_at_a_time(other) or not _any_drops(other)


def _rows_at_a_time(config: RunConfig) -> dict[str, dict[str, Any]]:
    """`micro_batch` of every training that it may matter to, as far as it parts their steps."""
    mode = find_mode(config.couple.mode)
    trains = mode.trains_bridge or mode.exact
    found = {"tune": config.tune, "couple": config.couple if trains else None, "ceiling": config.ceiling}
    sections: dict[str, PartsConfig | None] = {**found, **dict(config.baselines)}
    return {name: micro_batch_of(section) for name, section in sections.items() if section is not None}


def _any_drops(config: RunConfig) -> bool:
    """Whether the module or one of the models drops numbers in training; a model that is not here is taken to."""
    try:
        models = [
            load_config(source, trust_remote_code=config.trust_remote_code)
            for source in (config.small, config.large_path)
        ]
    except ModelError:
        return True
    return config.method.dropout > 0 or any(drops_out(model) for model in models)
