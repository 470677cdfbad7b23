"""How well the error that comes back through the Bridge points: cosines with the exact gradient, layer by layer."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plugbridge.tasks.encode import Encoded
from plugbridge.train import shares
from plugbridge.transfer.coupling import Coupling, Loss, require_gradients
from plugbridge.tuners.module import Slot

Cosines = dict[str, list[float]]
"""By stack, of every layer that has a module, from the lowest."""


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

    def wrong(self, first: Mapping[str, int]) -> set[tuple[str, int]]:
        """Stacks and layers where the gradient through the Bridge does not point the exact one's way at all.

        `first` is the first layer of each stack that has a module. None where no other layer would be left.
        """
        layers = {
            (stack, first.get(stack, 0) + i): cosine
            for stack, cosines in self.bridge.items()
            for i, cosine in enumerate(cosines)
        }
        found = {place for place, cosine in layers.items() if cosine <= 0}
        return found if len(found) < len(layers) else set()

    def advice(self) -> str | None:
        """What to do where the Bridge is no better than none; None where it is."""
        bridge, none = self.means()
        if bridge > none:
            return None
        return (
            f"the error through this Bridge points no better than without one (cosines with the exact gradient: "
            f"{bridge:.2f} and {none:.2f}); use prune: {{reduction: 1, bits: 3}}, or couple.mode: identity"
        )


def fidelity(coupling: Coupling, ways: WaysBack, rows: Sequence[Encoded], step: int, at_once: int) -> Fidelity:
    """Measure on these rows, `at_once` at a time, in all layers that have a module; leaves no gradient."""
    slots = [slot for slot in coupling.module if coupling.has_module(slot)]
    with _none_still(coupling):
        exact = _gradients(coupling, ways.exact, slots, rows, at_once)
        bridge, none = (
            _cosines(_gradients(coupling, way, slots, rows, at_once), exact) for way in (ways.bridge, ways.none)
        )
    return Fidelity(step, bridge, none)


@contextmanager
def _none_still(coupling: Coupling) -> Generator[None]:
    """Modules that stay still take gradients as the others do while this lasts."""
    still = set(coupling.still)
    coupling.still.clear()
    require_gradients(coupling)
    try:
        yield
    finally:
        coupling.still.update(still)
        require_gradients(coupling)


def _gradients(
    coupling: Coupling, loss: Loss, slots: list[Slot], rows: Sequence[Encoded], at_once: int
) -> dict[Slot, Tensor]:
    """The gradient of the rows' mean loss by the module; zero where none comes."""
    tensors = [coupling.module[slot] for slot in slots]
    total = [torch.zeros_like(tensor) for tensor in tensors]
    for part, share in shares(list(rows), at_once, lambda row: row.weight):
        found = torch.autograd.grad(loss(part) * share, tensors, allow_unused=True)
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
