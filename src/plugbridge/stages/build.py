"""The stages of a run in order, with what each depends on."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from plugbridge.config import PartsConfig, RunConfig
from plugbridge.cost import baseline_memory, measure, return_blocks, settle
from plugbridge.errors import ModelError
from plugbridge.models import drops_out, load_config
from plugbridge.prepare import Prepared
from plugbridge.progress import Progress
from plugbridge.run import Stage, StageResult
from plugbridge.stages.baselines import climb, finetune, rate_of_baseline
from plugbridge.stages.couple import alignment_passes, couple, uses_large
from plugbridge.stages.evaluate import evaluate
from plugbridge.stages.plug import plug, polish
from plugbridge.stages.repair import repair
from plugbridge.stages.room import baseline_room, bridge_room, couple_room, repair_room, score_room
from plugbridge.stages.shrink import prune, score
from plugbridge.stages.tune import ceiling, tune
from plugbridge.stages.work import Work, rate_of_training
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.needed import couple_needs, stages_of

BIG = 2**26
"""Bytes of a large model from which memory matters more than the time that it takes to return it."""


def build_stages(prepared: Prepared, root: Path, progress: Progress, only: str | None = None) -> list[Stage]:
    """The stages of a run in order, with what each depends on: those that make the models to be scored.

    Where `only` one will be run, all that the configuration has.
    """
    config, baseline, here = prepared.config, baseline_memory(), os.getpid()  # libraries and rows are loaded, no model
    common = {
        "seed": config.seed,
        "device": prepared.device,
        "dtype": config.dtype,
        "task": prepared.inputs["task"],
    }
    method = {
        "name": prepared.method.name,
        "rank": prepared.settings.rank,
        "alpha": prepared.settings.alpha,
        "dropout": prepared.settings.dropout,
    }
    small, large = prepared.inputs["small"], prepared.inputs["large"]
    # only where it is set, so that runs from before the key keep their digests
    bits = {} if config.load_in is None else {"load_in": config.load_in}

    def stage(
        name: str,
        needs: tuple[str, ...],
        depends: dict[str, Any],
        work: Callable[[Work], dict[str, Any]],
        room: Callable[[], int] = lambda: 0,
    ) -> Stage:
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

        return Stage(name, needs, {**common, **depends}, measured, room)

    tune_rate = rate_of_training(config.tune, prepared.method)
    couple_rate = rate_of_training(config.couple, prepared.method)
    stages = [
        stage(
            "tune",
            (),
            {
                "small": small,
                "method": method,
                "tune": _dump(config.tune),
                "rate": tune_rate,
                **_parts(prepared, config.tune, config.small),
            },
            tune,
        ),
        stage(
            "score",
            (),
            {"large": large, "score": _dump(config.score), "rows": DRAWN},
            score,
            partial(score_room, prepared),
        ),
        stage(
            "prune",
            ("score",),
            {"large": large, "prune": _dump(config.prune), "reads_tokens": find_mode(config.couple.mode).reads_tokens},
            prune,
            partial(bridge_room, prepared),
        ),
    ]
    if config.repair is not None:
        stages.append(
            stage(
                "repair",
                ("prune",),
                {"large": large, **bits, "repair": _dump(config.repair)},
                repair,
                partial(repair_room, prepared),
            )
        )
    stages += [
        stage(
            "couple",
            couple_needs(config),
            {
                "large": large,
                "method": method,
                "couple": _dump(config.couple),
                "rate": couple_rate,
                **({"rows": DRAWN} if alignment_passes(config) else {}),
                **_parts_of_coupling(prepared),
                **(bits if uses_large(config) else {}),
            },
            couple,
            partial(couple_room, prepared),
        ),
    ]
    coupled: tuple[str, ...] = ("couple",)
    if config.polish is not None:
        depends = {"large": large, **bits, "polish": config.polish.model_dump()}
        stages.append(stage("polish", coupled, depends, polish))
        coupled = ("couple", "polish")
    stages.append(stage("plug", coupled, {"large": large, "source": config.large_path}, plug))
    results: tuple[str, ...] = ("tune", "prune", "repair", *coupled, "plug")
    if config.ceiling is not None:
        depends = {
            "large": large,
            "method": method,
            "ceiling": _dump(config.ceiling),
            "rate": rate_of_training(config.ceiling, prepared.method),
            **_parts(prepared, config.ceiling, config.large_path),
        }
        stages.append(stage("ceiling", (), depends, ceiling))
        results = (*results, "ceiling")
    for name, depends, work, room in _baselines(prepared):
        stages.append(stage(name, (), depends, work, room))
        results = (*results, name)
    asked = stages_of(config)
    results = tuple(name for name in results if name in asked)
    limited = {} if config.evaluate.limit is None else {"rows": "drawn alike"}  # earlier versions took the first
    stages.append(
        stage(
            "evaluate",
            results,
            {"small": small, "large": large, **bits, "evaluate": _dump(config.evaluate), **limited},
            evaluate,
        )
    )
    return stages if only is not None else [stage for stage in stages if stage.name in asked]


Baseline = tuple[str, dict[str, Any], Callable[[Work], dict[str, Any]], Callable[[], int]]


def _baselines(prepared: Prepared) -> list[Baseline]:
    """Name, dependencies, work and disk of every baseline that the configuration asks for."""
    config = prepared.config
    found: list[Baseline] = []
    for size in ("small", "large"):
        for kind, work in (("finetuned", finetune), ("ladder", climb)):
            settings: PartsConfig | None = getattr(config.baselines, f"{size}_{kind}")
            if settings is None:
                continue
            name = f"{size}_{kind}"
            rate = rate_of_baseline(kind, settings)
            source = config.small if size == "small" else config.large_path
            depends = {"model": prepared.inputs[size], "baseline": _dump(settings), "rate": rate}
            depends |= _parts(prepared, settings, source, with_module=False)
            if kind == "ladder":
                depends |= {"score": _dump(config.score), "rows": DRAWN}
            room = partial(baseline_room, prepared, size, kind, settings)
            found.append((name, depends, partial(work, size=size), room))
    return found


DRAWN = "drawn by the seed"
"""How some training rows are chosen; earlier versions took the first, and their results are not these."""
UNSEEN = ("checkpoint_every", "keep", "micro_batch", "recompute")
"""Keys that change no result, beyond rounding; `micro_batch` does with dropout, and is then named beside them."""
LATER: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw",), "bits": (16,), "activations": ("bridge", None), "error_bound": (0.0,),
}  # fmt: skip
"""Keys that came later, and what they are where a run from before them has none: such a run need not be done anew."""


def _parts(prepared: Prepared, settings: PartsConfig, source: str, with_module: bool = True) -> dict[str, Any]:
    """How many rows go through a model at a time, where they drop other numbers together than one by one."""
    dropout = prepared.settings.dropout if with_module else 0.0
    config = load_config(source, trust_remote_code=prepared.config.trust_remote_code)
    return _micro_batch(settings) if dropout > 0 or drops_out(config) else {}


def _parts_of_coupling(prepared: Prepared) -> dict[str, Any]:
    """The same for coupling, where the Bridge has the large model's dropout as far as it trains."""
    config, settings = prepared.config, prepared.config.couple
    if not find_mode(settings.mode).trains_bridge:
        return {}
    if settings.bridge == "freeze":
        return _micro_batch(settings) if prepared.settings.dropout > 0 else {}
    return _parts(prepared, settings, config.large_path)


def _micro_batch(settings: PartsConfig) -> dict[str, Any]:
    some = settings.micro_batch
    return {} if some is None or some >= settings.batch_size else {"micro_batch": some}


def _dump(section: Any) -> dict[str, Any]:
    """A configuration section as JSON, without what does not change the result."""
    return seen(section.model_dump(mode="json"))


def same_result(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations differ in nothing but keys that change no result."""
    if seen(one.model_dump(mode="json")) != seen(other.model_dump(mode="json")):
        return False
    return _rows_at_a_time(one) == _rows_at_a_time(other) or not _any_drops(other)


def _rows_at_a_time(config: RunConfig) -> dict[str, dict[str, Any]]:
    """`micro_batch` of every training that it may matter to, as far as it parts their steps."""
    trains = find_mode(config.couple.mode).trains_bridge
    found = {"tune": config.tune, "couple": config.couple if trains else None, "ceiling": config.ceiling}
    sections: dict[str, PartsConfig | None] = {**found, **dict(config.baselines)}
    return {name: _micro_batch(section) for name, section in sections.items() if section is not None}


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


def seen(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a section of it, without the keys that change no result."""
    return {
        key: seen(cast(dict[str, Any], value)) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in UNSEEN and value not in LATER.get(key, ())
    }
