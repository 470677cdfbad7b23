"""What a step takes, from shapes alone: traced with fake tensors at shallow depths, extended to the true depth.

At every place of a step the bytes alive grow linearly with the number of layers of each kind: layers below the
first module that trains, and layers from there on, stack by stack. So one trace of a shallow model, and one more for
each kind with a layer added, give the true depth's count at every place; the largest of them is the peak.
"""

import gc
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from plugbridge.memory.alive import Alive, fake_tensors, marked
from plugbridge.memory.case import TARGETS, Case
from plugbridge.memory.steps import MakeStep, Step

Numbers = Mapping[torch.dtype, float]
"""Work by precision."""
Kind = tuple[str, bool]
"""A kind of layers: their stack, and whether they hold modules that train."""
SHALLOW = {True: 3, False: 2}
"""Layers of each kind in a trace: a first and a last one, and where modules train one between them.

One more where a model of several stacks is streamed: between two middle layers other blocks are read ahead than
between a middle one and an end.
"""


@dataclass(frozen=True)
class Trace:
    """Counts of one step: bytes alive at most by place, work done, tensors that train.

    `flops`, `moved`, `read`, `used` and `primitives` are as `Alive` counts them, of one repetition; `used` is of what
    was there before it.
    """

    peaks: dict[str, float]
    flops: Numbers
    moved: Numbers
    rows: int
    trained: float
    read: float = 0
    primitives: int = 0
    used: float = 0

    def keeping(self, primitive_bytes: int) -> "Trace":
        """The same on a processor whose matrix library keeps so much of every primitive."""
        more = primitive_bytes * self.primitives
        return replace(self, peaks={place: count + more for place, count in self.peaks.items()})

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return round(max(self.peaks.values()))


def predict(case: Case, make: MakeStep) -> Trace:
    """A step's counts at the case's own depth, without a tensor of it.

    What several rows have in memory at once grows linearly with them. Of a batch in parts a later one counts, which
    finds the gradients of those before it; the others only add work. Of parts that go together each adds its states.
    """
    gc.freeze()  # what is there already need not be looked through for every trace
    try:
        if case.at_once > 2:
            one, two = (_predict(replace(case, at_once=rows), make) for rows in (1, 2))
            return extended(one, one, two, case.at_once - 1)
        part = case.micro_batch or case.batch
        if case.together and case.batch > 3 * part:
            two, three = (_predict(replace(case, batch=parts * part), make) for parts in (2, 3))
            return extended(two, two, three, math.ceil(case.batch / part) - 2)
        if case.batch > part and not case.together:
            later, times = _predict(replace(case, batch=part, later=True), make), case.batch / part
            return _repeated(later, times)
        return _predict(case, make)
    finally:
        gc.unfreeze()


def _repeated(found: Trace, times: float) -> Trace:
    """The same peaks, and the work so often; a part of a part is read from disk as a whole."""
    flops, moved = ({number: times * count for number, count in each.items()} for each in (found.flops, found.moved))
    return replace(found, flops=flops, moved=moved, read=math.ceil(times) * found.read,
                   used=math.ceil(times) * found.used)  # fmt: skip


def _predict(case: Case, make: MakeStep) -> Trace:
    true = kinds_of(case)
    extra = case.streamed and len(case.layers) > 1
    shallow = {kind: min(count, SHALLOW[kind[1]] + extra) for kind, count in true.items()}
    base = trace(at_depth(case, shallow), make)
    found = base
    for kind, count in true.items():
        more = count - shallow[kind]
        if more > 0:
            deeper = trace(at_depth(case, {**shallow, kind: shallow[kind] + 1}), make)
            found = extended(found, base, deeper, more)
    return found


def kinds_of(case: Case) -> dict[Kind, int]:
    """How many layers a case has of each kind."""
    found: dict[Kind, int] = {}
    for stack, count in case.layers.items():
        found[stack, True] = case.trained.get(stack, count)
        found[stack, False] = count - found[stack, True]
    return found


def at_depth(case: Case, kinds: Mapping[Kind, int]) -> Case:
    """A case with so many layers of each kind."""
    trained = {stack: count for (stack, trains), count in kinds.items() if trains}
    return case.with_layers({stack: trained[stack] + kinds[stack, False] for stack in trained}, trained)


def extended(found: Trace, base: Trace, deeper: Trace, times: int) -> Trace:
    """A trace with `times` the difference of two others added."""
    peaks = {place: found.peaks[place] + times * (deeper.peaks[place] - base.peaks[place]) for place in base.peaks}
    return Trace(
        peaks,
        _extended(found.flops, base.flops, deeper.flops, times),
        _extended(found.moved, base.moved, deeper.moved, times),
        base.rows,
        found.trained + times * (deeper.trained - base.trained),
        found.read + times * (deeper.read - base.read),
        max(found.primitives, deeper.primitives),
        found.used + times * (deeper.used - base.used),
    )


def _extended(found: Numbers, base: Numbers, deeper: Numbers, times: int) -> Numbers:
    return {n: found.get(n, 0) + times * (deeper[n] - base.get(n, 0)) for n in deeper}


def trace(case: Case, make: MakeStep) -> Trace:
    """Make a step of fake tensors and do it."""
    with fake_tensors(), Alive() as alive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = make(case)
        gc.collect()
        return count(alive, case, step)


def count(alive: Alive, case: Case, step: Step) -> Trace:
    """Do a step under a count that is on already."""
    step.begin()
    alive.peaks.clear()
    alive.flops.clear()
    alive.moved.clear()
    alive.read = alive.used = 0
    alive.weights = set(alive.known)
    alive.primitives.clear()
    alive.chosen, alive.columns = step.chosen, TARGETS[case.kind]
    with ExitStack() as hooks:
        for model, name in step.marks:
            hooks.enter_context(marked(alive, model, places(case, name)))
        for name, phase in step.phases.items():
            alive.go_to(name)
            phase()
    return Trace(
        dict(alive.peaks), dict(alive.flops), dict(alive.moved), step.rows, step.trained, alive.read,
        len(alive.primitives), alive.used,
    )  # fmt: skip


def places(case: Case, name: str) -> dict[str, str]:
    """Names of the places where a model's sublayers run: first, middle or last of the layers of their kind."""
    found: dict[str, str] = {}
    for stack_name, stack in case.family.stack.items():
        kinds = kinds_of(case)
        below, above = kinds[stack_name, False], kinds[stack_name, True]
        for layer in range(below + above):
            trains = layer >= below
            at, of = (layer - below, above) if trains else (layer, below)
            end = "first" if at == 0 else "last" if at == of - 1 else "middle"
            for sublayer in stack.sublayers:
                place = f"{name} {stack_name} {'trained' if trains else 'frozen'} {end} {sublayer.function}"
                found[f"{stack.path.format(layer)}.{sublayer.function}"] = place
        found[stack.final_norm] = f"{name} {stack_name} end"
    return found
