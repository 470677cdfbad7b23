"""Rounding that keeps a product: levels chosen for the vectors that a matrix is multiplied by.

Rounding every weight to its nearest level keeps the matrix; what matters is ``s @ matrix`` for the vectors s that come:
going forward a layer's inputs, going back the errors at its outputs. GPTQ (Frantar et al. 2023) rounds row after row
and corrects the rows that are still to come for what each has lost, as the vectors' second moment says. Here the rows
may be a layer's outputs as well as its inputs, and levels and scales are those of `tensors.packed`.
"""

import math

import torch
from torch import Tensor

from plugbridge.tensors.packed import (
    GROUP,
    Bits,
    Packed,
    best_scales,
    grouped,
    join,
    levels,
    nearest,
    pack,
    power_of_two,
    read_scales,
    real_places,
    to_scales,
)

DAMPING = 0.05
"""What is added to the second moment's diagonal, as a share of its mean: vectors that were not seen matter as well."""
_ROWS = 128
"""Rows after which what they have lost is taken from all rows to come at once."""


@torch.no_grad()
def calibrated(matrix: Tensor, bits: Bits, vectors: Tensor | None, damping: float = DAMPING) -> Packed:
    """A matrix (rows, columns) packed for the products with vectors (n, rows): never worse for them than the nearest.

    Without vectors, or where they are all zero or not finite, every weight takes its nearest level.
    """
    plain = pack(matrix, bits)
    largest = 0.0 if vectors is None else float(vectors.abs().amax())
    if vectors is None or not 0 < largest < math.inf:
        return plain
    seen = vectors.to(matrix.device, torch.float32) / largest  # only directions and ratios matter
    found = _corrected(matrix, bits, seen, damping)
    return found if loss(matrix, found, seen) < loss(matrix, plain, seen) else plain


def loss(matrix: Tensor, packed: Packed, vectors: Tensor) -> float:
    """Squared error of the products of vectors (n, rows) with a packed matrix (rows, columns)."""
    return float((vectors @ (matrix.float() - packed.unpack())).square().sum())


def _corrected(matrix: Tensor, bits: Bits, vectors: Tensor, damping: float) -> Packed:
    rows, columns = matrix.shape
    order, upper = _factor(vectors, damping)
    left = grouped(matrix).view(rows, -1)[order].float()  # a copy
    grid, real = levels(bits).to(left.device), real_places(columns, left.device)
    first = best_scales(left.view(-1, GROUP), bits, real.repeat(rows, 1))
    top = power_of_two(2 * first.amax())  # corrections may make scales larger
    codes, scales = [], []
    for start in range(0, rows, _ROWS):
        end = min(rows, start + _ROWS)
        lost = torch.empty_like(left[start:end])
        for row in range(start, end):
            groups = left[row].view(-1, GROUP)
            kept = to_scales(best_scales(groups, bits, real), top)
            scale = read_scales(kept, top)
            code = nearest(groups, scale, bits)
            rounded = (grid[code.int()] * scale.unsqueeze(-1)).view(-1)
            lost[row - start] = (left[row] - rounded) * real.view(-1) / upper[row, row]
            left[row + 1 : end] -= upper[row, row + 1 : end, None] * lost[row - start]
            codes.append(join(code, bits))
            scales.append(kept)
        left[end:] -= upper[start:end, end:].mT @ lost
    back = order.argsort()
    every = torch.stack(codes)[back].flatten(0, 1), torch.stack(scales)[back].flatten()
    return Packed(*every, top, torch.Size((rows, columns)))


def _factor(vectors: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Rows in their order, those of the largest vectors first, and the upper Cholesky factor of the inverse moment.

    Damping grows until there is one.
    """
    moment = vectors.mT @ vectors
    diagonal = moment.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    moment = moment[order][:, order]
    mean = float(diagonal.mean())
    while True:
        damped = moment + damping * mean * torch.eye(len(order), device=moment.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return order, upper
        damping *= 10
