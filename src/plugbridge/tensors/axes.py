"""Tensors with named axes, and the one operation on them: change a named axis.

A pattern such as ``"hidden (qkv heads head_dim)"`` names the axes of a tensor; parentheses
join several axes into one dimension, the last varying fastest (as in einops). Selecting,
projecting, duplicating and folding are all `transform` with different operators.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plugbridge.tensors.patterns import axis_names, infer_sizes, parse


@dataclass(frozen=True)
class Select:
    """Keep some positions of an axis, in the order given. index: (new,) long."""

    index: Tensor

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.index_select(dim, self.index.to(tensor.device))

    @property
    def size(self) -> int:
        return self.index.numel()


@dataclass(frozen=True)
class Project:
    """Multiply an axis by a matrix. matrix: (new, old); differentiable in both operands."""

    matrix: Tensor

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        matrix = self.matrix.to(tensor.device, tensor.dtype)
        return (tensor.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)

    @property
    def size(self) -> int:
        return self.matrix.shape[0]


Op = Select | Project


def transform(
    tensor: Tensor,
    pattern: str,
    ops: Mapping[str, Op],
    known: Mapping[str, int],
    what: str = "tensor",
) -> Tensor:
    """Change named axes of a tensor.

    ``ops`` maps an axis, or several neighbouring axes of one dimension joined by a space
    (``"heads head_dim"``), to an operator; axes the pattern does not have are skipped.
    ``known`` gives the sizes of composite axes before the change.
    Shape: as the pattern says, with the changed axes' new sizes. Raises ShapeError.
    """
    sizes = infer_sizes(pattern, tuple(tensor.shape), known, what)
    dims = [list(dim) for dim in parse(pattern)]
    result = tensor.reshape([sizes[name] for dim in dims for name in dim])
    for key, op in ops.items():
        words = key.split()
        for dim in dims:
            if words[0] not in dim:
                continue
            start = dim.index(words[0])
            if dim[start : start + len(words)] != words:
                continue
            position = [name for d in dims for name in d].index(words[0])
            result = result.flatten(position, position + len(words) - 1)
            dim[start : start + len(words)] = [key]
            result = op.apply(result, position)
            break
    shape: list[int] = []
    position = 0
    for dim in dims:
        shape.append(math.prod(result.shape[position : position + len(dim)]))
        position += len(dim)
    return result.reshape(shape)


def reduce_to(tensor: Tensor, pattern: str, axis: str, known: Mapping[str, int]) -> Tensor:
    """Sum a tensor over every axis but one. Returns (size of axis,)."""
    sizes = infer_sizes(pattern, tuple(tensor.shape), known)
    names = axis_names(pattern)
    expanded = tensor.reshape([sizes[name] for name in names])
    others = [i for i, name in enumerate(names) if name != axis]
    return expanded.sum(dim=others) if others else expanded


def selection_matrix(select: Select, old: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 0/1 matrix that `select` is a projection by. Returns (new, old)."""
    device = select.index.device
    matrix = torch.zeros(select.size, old, dtype=dtype, device=device)
    matrix[torch.arange(select.size, device=device), select.index] = 1
    return matrix


def matrix_of(op: Op, old: int) -> Tensor:
    """The matrix (new, old) that an operator multiplies by; a copy."""
    return op.matrix.clone() if isinstance(op, Project) else selection_matrix(op, old)
