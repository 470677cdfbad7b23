"""The most faithful way to train a module in the memory given, and what coupling as asked gains or loses by its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plugbridge.config import RunConfig
from plugbridge.errors import ConfigError, ModelError
from plugbridge.memory.predict import Trace
from plugbridge.memory.rates import Rates, seconds_of
from plugbridge.models import pick_device
from plugbridge.plan.advice import Settings, changed, installed, written
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import Work, peak_of, streamable, subjects_of, works_of
from plugbridge.preflight import resolve
from plugbridge.quantised import check_blocks
from plugbridge.transfer.acting import idle_settings
from plugbridge.transfer.couple import find_mode

EXACT = "exact gradients"
QLORA = "exact gradients of the model in 4 bits (QLoRA)"
SINGLE: Settings = {"couple.micro_batch": 1}


@dataclass(frozen=True)
class Faithful:
    """A way to train the module that fits: `settings` ask for it, `said` is what coupling as asked gains or loses.

    `peak_bytes`, `seconds` and `read_bytes` are of one step.
    """

    way: str
    settings: tuple[str, ...]
    peak_bytes: int
    seconds: float
    read_bytes: int
    said: str


def most_faithful(
    config: RunConfig,
    length: int,
    works: Sequence[tuple[Work, Trace]],
    memory: int,
    rates: Mapping[torch.dtype, Rates],
    predictions: Predictions,
) -> Faithful | None:
    """The first way that fits: exact gradients in memory, then streamed, then through 4 bits; None where none does.

    `config` is as it was asked for, and `works` are those of its run, with their counts; None is also where the run
    does not couple, or takes no steps.
    """
    coupled = next((trace for work, trace in works if work.row.method.startswith("couple (")), None)
    if coupled is None or config.couple.steps == 0:
        return None
    for way, asked in _ways(config):
        met = _met(config, asked, length, memory)
        if met is None:
            continue
        settings, work = met
        counts = predictions.of(work.row)
        if (peak := peak_of(work, counts)) <= memory:
            seconds = seconds_of(counts, rates)
            said = _said(config.couple.mode, coupled, seconds_of(coupled, rates), counts, seconds)
            return Faithful(way, settings, peak, seconds, round(counts.read), said)
    return None


def _ways(config: RunConfig) -> Iterator[tuple[str, Settings]]:
    """Ways by their faithfulness, and of equals the fastest first, with what they ask for."""
    mode: Settings = {"couple.mode": "backprop"}
    parts: tuple[Settings, ...] = ({},) if config.couple.micro_batch == 1 else ({}, SINGLE)
    whole: Settings = {} if config.load_in is None else {"large.load_in": None}
    for resident, streamed in (("all", False), ("none", True)):
        if not streamed or streamable(config):
            for more in parts:
                way = f"{EXACT}, {'streamed' if streamed else 'in memory'}"
                yield way, {**mode, "resident": resident, **more, **whole}
    if installed("bitsandbytes"):
        resident = {"resident": "all"} if config.resident == "none" else {}
        yield QLORA, {**mode, "large.load_in": "4bit", **SINGLE, **resident}


def _met(config: RunConfig, asked: Settings, length: int, memory: int) -> tuple[tuple[str, ...], Work] | None:
    """All that a way needs to be set for a run to accept it, and its coupling; None where there is no such run."""
    try:
        settings = _accepted(config, asked)
        subjects = subjects_of(changed(config, settings), length, memory)
        if subjects.config.load_in is not None:
            check_blocks("", *subjects.large.on_meta(), "4bit", pick_device(config.device))
    except (ConfigError, ModelError):
        return None
    work = next((work for work in works_of(subjects) if work.row.method.startswith("couple (")), None)
    return None if work is None else (tuple(written(*setting) for setting in settings.items()), work)


def _accepted(config: RunConfig, asked: Settings) -> dict[str, Any]:
    """What is asked for, and what was set for the mode so far and is refused beside it, at its default.

    Raises ConfigError where what is asked for does nothing itself.
    """
    settings = dict(asked)
    couple, models = config.couple, config.evaluate.models
    if couple.cache != "off":
        settings["couple.cache"] = "off"
    if couple.down != "select":
        settings["couple.down"] = "select"
    if couple.layer_map != "uniform" and couple.plug is None:  # which is then fresh
        settings["couple.layer_map"] = "uniform"
    if models is not None and "bridge_coupled" in models:
        others = ["large_plugged" if name == "bridge_coupled" else name for name in models]
        settings["evaluate.models"] = [*dict.fromkeys(others)]
    while idle := idle_settings(resolve(changed(config, settings))):  # what rests on those is idle after them
        if idle.keys() & settings.keys():
            raise ConfigError(f"{', '.join(idle)}: without effect in this configuration")
        settings |= idle
    return settings


def _said(mode: str, coupled: Trace, took: float, exact: Trace, takes: float) -> str:
    """What a step of coupling as asked gains or loses beside the exact one."""
    if find_mode(mode).exact:
        return "which is what this run does, or could do with less"
    time, room = took / max(takes, 1e-9), coupled.peak / max(exact.peak, 1)
    read = f", reads {coupled.read / exact.read:.2f} of its bytes" if exact.read else ""
    what = f"{mode} takes {time:.2f} of its time and {room:.2f} of its memory a step{read}"
    if time >= 1 and room >= 1:
        return f"{what}: it gains nothing here, and its error is only near the exact one"
    return f"{what}; its error is only near the exact one"
