"""How well the error that comes back through the Bridge points: cosines with the exact gradient, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plugbridge.tasks.encode import Encoded
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.tuners.module import Slot

Cosines = dict[str, list[float]]
"""By stack, of every layer whose module trains, from the lowest."""


@dataclass(frozen=True)
class WaysBack:
    """A loss whose error comes back through the Bridge; the same without one, and the same by backpropagation."""

    bridge: Loss
    none: Loss
    exact: Loss

    def __call__(self, rows: list[Encoded]) -> Tensor:
        return self.bridge(rows)


@dataclass(frozen=True)
class Fidelity:
    """Cosines of the module's gradient with the exact one, through the Bridge and without it, before a step."""

    step: int
    bridge: Cosines
    none: Cosines

    def means(self) -> tuple[float, float]:
        """Means over the layers, with the Bridge and without."""
        return _mean(self.bridge), _mean(self.none)

    def said(self) -> str:
        """In a line's part."""
        bridge, none = self.means()
        return f"fidelity {bridge:.2f} (no Bridge: {none:.2f})"

    def advice(self) -> str | None:
        """What to do where the Bridge is no better than none; None where it is."""
        bridge, none = self.means()
        if bridge > none:
            return None
        return (
            f"the error through this Bridge points no better than without one (cosines with the exact gradient: "
            f"{bridge:.2f} and {none:.2f}); use prune: {{reduction: 1, bits: 3}}, or couple.mode: identity"
        )


def fidelity(coupling: Coupling, ways: WaysBack, rows: Sequence[Encoded], step: int) -> Fidelity:
    """Measure on these rows, one at a time; leaves no gradient."""
    slots = [slot for slot in coupling.module if coupling.trains(slot)]
    exact = _gradients(coupling, ways.exact, slots, rows)
    bridge, none = (_cosines(_gradients(coupling, way, slots, rows), exact) for way in (ways.bridge, ways.none))
    return Fidelity(step, bridge, none)


def _gradients(coupling: Coupling, loss: Loss, slots: list[Slot], rows: Sequence[Encoded]) -> dict[Slot, Tensor]:
    """The module's gradient, summed over rows; zero where none comes."""
    tensors = [coupling.module[slot] for slot in slots]
    total = [torch.zeros_like(tensor) for tensor in tensors]
    for row in rows:
        found = torch.autograd.grad(loss([row]), tensors, allow_unused=True)
        for whole, part in zip(total, cast("tuple[Tensor | None, ...]", found), strict=True):
            if part is not None:
                whole += part
    return dict(zip(slots, total, strict=True))


def _cosines(found: dict[Slot, Tensor], exact: dict[Slot, Tensor]) -> Cosines:
    layers = sorted({(slot.stack, slot.layer) for slot in exact})
    cosines: Cosines = {}
    for stack, layer in layers:
        chosen = [slot for slot in exact if (slot.stack, slot.layer) == (stack, layer)]
        one, other = (torch.cat([side[slot].flatten().double() for slot in chosen]) for side in (found, exact))
        cosines.setdefault(stack, []).append(float(torch.cosine_similarity(one, other, dim=0)))
    return cosines


def _mean(cosines: Cosines) -> float:
    values = [value for layers in cosines.values() for value in layers]
    return sum(values) / len(values)
