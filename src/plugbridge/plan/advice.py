"""Which settings would make a run fit."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from plugbridge.config import RunConfig
from plugbridge.errors import ConfigError
from plugbridge.memory.packed import BITS
from plugbridge.memory.rows import Row
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import Work, peak_of, subjects_of, works_of
from plugbridge.prepare import resolve
from plugbridge.transfer.couple import find_mode


@dataclass(frozen=True)
class Advice:
    """`settings` with which all our stages fit; or a stage that is `stuck`, which none of those tried makes fit."""

    settings: tuple[str, ...]
    stuck: str | None = None


ADAFACTOR = "couple.optimizer: adafactor"
CACHE = "couple.cache: disk"
FREEZE = "couple.bridge: freeze"
BUDGETS = (1 / 32, 1 / 64, 1 / 128, 1 / 256)
"""Shares of the large model's parameters that a Bridge may have; those too small for a model are left out."""
LARGE = ("score", "prune", "repair", "couple", "polish", "evaluate")
CHANGES: tuple[tuple[str, dict[str, dict[str, Any]], tuple[str, ...]], ...] = (
    ("resident: none", {"": {"resident": "none"}}, LARGE),
    ("score.keep: disk", {"score": {"keep": "disk"}}, ("score",)),
    (CACHE, {"couple": {"cache": "disk"}}, ("couple (",)),
    ("tune.micro_batch: 1", {"tune": {"micro_batch": 1}}, ("tune (",)),
    ("couple.recompute: true", {"couple": {"recompute": True}}, ("couple",)),
    ("couple.micro_batch: 1", {"couple": {"micro_batch": 1}}, ("couple",)),
    (ADAFACTOR, {"couple": {"optimizer": "adafactor"}}, ("couple",)),
    ("evaluate.batch_size: 1", {"evaluate": {"batch_size": 1}}, ("evaluate", "tune: validation")),
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
    (FREEZE, {"couple": {"bridge": "freeze"}}, ("couple (",)),
    ("large.load_in: 4bit", {"large": {"load_in": "4bit"}}, ("repair", "couple", "polish", "evaluate")),
    ("prune.reduction: 8", {"prune": {"reduction": 8}}, ("prune", "repair", "couple")),
    *((f"prune.budget: {share}", {"prune": {"budget": share}}, ("prune", "repair", "couple")) for share in BUDGETS),
)
"""Settings that save memory, those first that change no result or little, with the stages that they concern."""


def advise(
    config: RunConfig, length: int, memory: int, tight: dict[str, int], predictions: Predictions | None = None
) -> Advice:
    """The first settings, each added to those before it that help, with which all our stages fit.

    `tight` are the peaks of the stages that do not fit. The search ends with the first stage that is left without a
    setting to try.
    """
    predictions = Predictions() if predictions is None else predictions
    predictions.expect(_likely(config, length, memory, set(tight), predictions))
    chosen: list[int] = []
    for number in range(len(CHANGES)):
        over = [name for name, peak in tight.items() if peak > memory]
        if (stuck := _stuck(config, over, number)) is not None:
            return Advice((), stuck)
        tried, works = _tried(config, length, memory, over, number)
        peaks = {work.row.method: peak_of(work, predictions.of(work.row)) for work in works}
        if any(peak < 0.98 * tight[name] for name, peak in peaks.items()):
            config, tight = tried, {**tight, **peaks}
            chosen = [*(one for one in chosen if not _keys(one) <= _keys(number)), number]
        if all(peak <= memory for peak in tight.values()):
            return Advice(tuple(CHANGES[one][0] for one in chosen))
    return Advice((), next(name for name, peak in tight.items() if peak > memory))


def _keys(number: int) -> set[tuple[str, str]]:
    """What a change sets: one that sets the same and comes later takes its place."""
    return {(section, key) for section, keys in CHANGES[number][1].items() for key in keys}


def _likely(config: RunConfig, length: int, memory: int, tight: set[str], predictions: Predictions) -> list[Row]:
    """Every stage under the first change of it that is not known: what the search asks for at first."""
    found: list[Row] = []
    for number in range(len(CHANGES)):
        left = tight - {row.method for row in found}
        rows = (work.row for work in _tried(config, length, memory, left, number)[1])
        found.extend(row for row in rows if row not in predictions)
    return found


def _tried(
    config: RunConfig, length: int, memory: int, names: Collection[str], number: int
) -> tuple[RunConfig, list[Work]]:
    """A configuration with a change, and those of the named stages that it may help; none if it cannot be."""
    _, change, _ = CHANGES[number]
    helped = [name for name in names if _may_help(config, name, number)]
    if not helped:
        return config, []
    try:
        tried = changed(config, change)
        subjects = subjects_of(tried, length, memory)
        works = [work for work in works_of(subjects) if work.row.method in helped]
    except ConfigError:  # such as a Bridge too small for the model's heads
        return config, []
    if tried.load_in is not None and subjects.parameters * BITS[tried.load_in] / 8 > memory:
        return config, []  # the weights alone do not fit: nothing to trace
    return tried, works


def _stuck(config: RunConfig, over: list[str], number: int) -> str | None:
    """The first stage that neither this change nor a later one may help."""
    later = range(number, len(CHANGES))
    return next((name for name in over if not any(_may_help(config, name, at) for at in later)), None)


def _may_help(config: RunConfig, name: str, number: int) -> bool:
    """Whether a change concerns a stage and changes anything; quantised weights do not stream."""
    text, change, concerns = CHANGES[number]
    if not name.startswith(concerns):
        return False
    trains = find_mode(config.couple.mode).trains_bridge and config.couple.bridge == "train"
    if text in (ADAFACTOR, FREEZE) and not trains:
        return False  # a module's moments are nothing to save
    if text == CACHE and config.couple.cache != "memory":
        return False  # without a cache there is less still
    if config.prune.budget is not None and change.get("prune", {}).get("budget", 0) >= config.prune.budget:
        return False  # it would be larger, or the same
    try:
        tried, now = resolve(changed(config, change)), resolve(changed(config, {}))
    except ConfigError:  # such as a budget beside the reduction that is asked for
        return False
    return tried != now and (tried.resident != "none" or tried.load_in is None)


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
