"""The most faithful way to train a module in the memory given, and what coupling as asked gains or loses by its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from plugbridge.errors import ModelError
from plugbridge.memory.case import Case
from plugbridge.memory.predict import Trace
from plugbridge.memory.rates import Rates, seconds_of
from plugbridge.memory.rows import Row
from plugbridge.memory.steps import STEPS
from plugbridge.models import pick_device
from plugbridge.plan.advice import installed
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import Subjects, Work, streamable
from plugbridge.quantised import check_blocks
from plugbridge.transfer.couple import find_mode

EXACT = "exact gradients"
QLORA = "exact gradients of the model in 4 bits (QLoRA)"


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
    s: Subjects,
    works: Sequence[tuple[Work, Trace]],
    memory: int,
    rates: Mapping[torch.dtype, Rates],
    predictions: Predictions,
) -> Faithful | None:
    """The first way that fits: exact gradients in memory, then streamed, then through 4 bits; None where none does.

    `works` are those of the run, with their counts; None is also where the run does not couple.
    """
    coupled = next((trace for work, trace in works if work.row.method.startswith("couple (")), None)
    if coupled is None:
        return None
    for way, settings, case in _ways(s):
        counts = predictions.of(Row("couple (backprop)", "", case, STEPS["couple, backprop"]))
        if counts.peak <= memory:
            seconds = seconds_of(counts, rates)
            said = _said(s.config.couple.mode, coupled, seconds_of(coupled, rates), counts, seconds)
            return Faithful(way, settings, counts.peak, seconds, round(counts.read), said)
    return None


def _ways(s: Subjects) -> Iterator[tuple[str, tuple[str, ...], Case]]:
    """Ways by their faithfulness, and of equals the fastest first."""
    couple = s.config.couple
    case = replace(
        s.large.alone(), bits=None, streamed=False, together=True, batch=couple.batch_size,
        micro_batch=couple.micro_batch,
    )  # fmt: skip
    parts = {(): case.micro_batch, ("couple.micro_batch=1",): 1}
    mode = "couple.mode=backprop"
    for resident, streamed in (("all", False), ("none", True)):
        if streamed and not streamable(s.config):
            continue
        for more, count in parts.items():
            found = replace(case, streamed=streamed, micro_batch=count)
            yield f"{EXACT}, {'streamed' if streamed else 'in memory'}", (mode, f"resident={resident}", *more), found
    packed = replace(case, bits="4bit", micro_batch=1)
    if installed("bitsandbytes") and _quantises(s):
        yield QLORA, (mode, "large.load_in=4bit", "couple.micro_batch=1"), packed


def _quantises(s: Subjects) -> bool:
    try:
        check_blocks("", *s.large.on_meta(), "4bit", pick_device(s.config.device))
    except ModelError:
        return False
    return True


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
