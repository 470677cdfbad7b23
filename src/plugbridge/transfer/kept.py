"""What a forward pass keeps for the backward pass, in few bits (Chen et al. 2021, "ActNN"; Liu et al. 2022, "GACT").

Every group of neighbouring values is rounded to evenly spaced levels between its least and its largest.
"""

import weakref
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

KeptBits = Literal[8, 4]
GROUP = 64
"""Values that share two 16-bit numbers, where the last dimension is so many times something; else all of it do."""
SMALL = 1024
"""Tensors of fewer values are kept as they are."""


@dataclass(frozen=True)
class Rounded:
    """A tensor of `shape` as level numbers (groups, size), two to a byte in 4 bits: values are least + step number."""

    numbers: Tensor
    least: Tensor
    step: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def values(self) -> Tensor:
        """The tensor, rounded."""
        numbers = self.numbers
        if numbers.numel() < self.shape.numel():
            numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
        found = torch.addcmul(self.least.float(), self.step.float(), numbers.float())
        return found.to(self.dtype).view(self.shape)


def rounded(tensor: Tensor, bits: KeptBits) -> Rounded:
    """A floating-point tensor in `bits` bits; 8 where groups of an odd size cannot be 4."""
    size = GROUP if tensor.shape[-1] % GROUP == 0 else tensor.shape[-1]
    groups = tensor.detach().reshape(-1, size).float()
    highest = 15 if bits == 4 and size % 2 == 0 else 255
    least, most = groups.aminmax(dim=-1, keepdim=True)
    least, step = least.bfloat16(), ((most - least) / highest).bfloat16()
    numbers = ((groups - least.float()) / step.float().clamp_min(1e-30)).round_().clamp_(0, highest).to(torch.uint8)
    if highest == 15:
        numbers = numbers[:, ::2] | (numbers[:, 1::2] << 4)
    return Rounded(numbers, least, step, tensor.shape, tensor.dtype)


@contextmanager
def kept_in(bits: KeptBits, spared: Collection[Tensor]) -> Generator[None]:
    """While it lasts, what autograd keeps of activations is kept in `bits` bits.

    Weights and what needs no gradient (such as a softmax's sum) are kept as they are, and so are the tensors `spared`.
    What several operations keep is rounded once.
    """
    own = {id(tensor.untyped_storage()) for tensor in spared}
    known: dict[int, dict[Any, Rounded]] = {}  # by storages that live

    def keep(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        plain = not tensor.requires_grad or tensor.is_leaf or not tensor.is_floating_point()
        if plain or tensor.numel() < SMALL or id(storage) in own:
            return tensor
        if id(storage) not in known:
            known[id(storage)] = {}
            weakref.finalize(storage, known.pop, id(storage), None).atexit = False
        view = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor._version)
        if view not in known[id(storage)]:
            known[id(storage)][view] = rounded(tensor, bits)
        return known[id(storage)][view]

    def give(kept: Any) -> Tensor:
        return kept.values() if isinstance(kept, Rounded) else kept

    with saved_tensors_hooks(keep, give):
        yield
    known.clear()
