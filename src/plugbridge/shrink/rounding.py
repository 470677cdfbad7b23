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
    grid_of,
    grouped,
    join,
    nearest,
    pack,
    read_scales,
    real_places,
    to_scales,
)

DAMPING = 0.3
"""What is added to the second moment's diagonal, as a share of its mean: vectors that were not seen matter as well.

GPTQ's own 0.01 is for a model that stays. Here a module trains, and what was recorded before ages: on GPT-2 in 2 bits
the cosine at the end is 0.77 at 0.01, 0.84 at 0.05, 0.87 at 0.3 and 0.86 at 1; on T5 all are level
(docs/results/rounding.md).
"""
_ROWS = 128
"""Rows after which what they have lost is taken from those to come at once."""


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
    found = _corrected(matrix, bits, seen, damping, 2 * plain.top)  # corrections may make scales larger
    return found if loss(matrix, found, seen) < loss(matrix, plain, seen) else plain


def loss(matrix: Tensor, packed: Packed, vectors: Tensor) -> float:
    """Squared error of the products of vectors (n, rows) with a packed matrix (rows, columns)."""
    rows, columns = matrix.shape
    groups = -(-columns // GROUP)
    product = vectors.new_zeros(len(vectors), columns)
    for start in range(0, rows, _ROWS):
        end = min(rows, start + _ROWS)
        codes, scales = (part[start * groups : end * groups] for part in (packed.codes, packed.scales))
        rounded = Packed(codes, scales, packed.top, torch.Size((end - start, columns))).unpack()
        product.addmm_(vectors[:, start:end], matrix[start:end].float() - rounded)
    return float(product.square().sum())


def _corrected(matrix: Tensor, bits: Bits, vectors: Tensor, damping: float, top: Tensor) -> Packed:
    """GPTQ, its second moment V^T V + d I kept as the vectors V (n, rows) themselves: far fewer than there are rows.

    What a rounded row has lost, e, is made up for by the rows to come, by v_j S^-1 v e each: v is the row's column of
    V, v_j that of a row to come, and S = d I plus the sum of all v_j v_j^T (Woodbury). It is done at once for the next
    few rows, and summed up over rows, as S^-1 v e (n, columns), for those behind them.
    """
    rows, columns = matrix.shape
    order = vectors.square().sum(0).argsort(descending=True, stable=True)  # those of the largest vectors first
    seen = vectors[:, order].double()
    still = seen @ seen.mT  # S, of all rows to come
    still.diagonal().add_(damping * float(seen.square().sum()) / rows)
    wide, real = grouped(matrix), real_places(columns, matrix.device)
    per_row, grid = len(real), grid_of(bits, matrix.device)
    filled = real if columns % GROUP else None
    owed = torch.zeros(len(seen), per_row * GROUP, device=matrix.device)
    codes = torch.empty(rows, per_row, 8 * bits, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(rows, per_row, dtype=torch.int8, device=matrix.device)
    for start in range(0, rows, _ROWS):
        some, mine = order[start : start + _ROWS], seen[:, start : start + _ROWS]
        still -= mine @ mine.mT
        solved = torch.cholesky_solve(mine, torch.linalg.cholesky(still))
        shares = _shares(mine.mT @ solved)
        left = wide.view(rows, -1)[some].float() + mine.mT.float() @ owed
        lost = torch.empty_like(left)
        chosen = torch.empty(len(some), per_row, GROUP, dtype=torch.int32, device=matrix.device)
        for row in range(len(some)):
            groups = left[row].view(-1, GROUP)
            kept = to_scales(best_scales(groups, grid, filled), top)
            scale = read_scales(kept, top)
            code = nearest(groups, scale, grid)
            off = torch.addcmul(groups, grid.levels[code], scale.unsqueeze(-1), value=-1)
            lost[row] = (off if filled is None else off * filled).view(-1)
            left[row + 1 :].addr_(shares[row, row + 1 :], lost[row], alpha=-1)
            chosen[row], scales[some[row]] = code, kept
        codes[some] = join(chosen.flatten(0, 1), bits).view(len(some), per_row, -1)
        owed += (solved.float() @ shares.mT) @ lost
    return Packed(codes.flatten(0, 1), scales.flatten(), top, torch.Size((rows, columns)))


def _shares(products: Tensor) -> Tensor:
    """What each of some rows leaves to those after it of what it has lost, (rows, rows), with ones on the diagonal.

    products: v_i S^-1 v_j of these rows, S being of the rows behind them all.
    """
    moment = products + torch.eye(len(products), dtype=products.dtype, device=products.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return (upper / upper.diagonal().unsqueeze(-1)).float()
