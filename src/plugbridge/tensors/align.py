"""Maps between the hidden states of two models, and how alike the states are, from sums over the same tokens.

Nothing here keeps states: tokens may come in any number of parts.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from plugbridge.errors import ShapeError


class Moments:
    """What a linear map from x: (tokens, width) to y: (tokens, target) is fitted to: X^T X and X^T Y, in float64."""

    def __init__(self, width: int, target: int) -> None:
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._cross = torch.zeros(width, target, dtype=torch.float64)
        self._sums: dict[Hashable, tuple[int, Tensor, Tensor]] = {}

    def add(self, x: Tensor, y: Tensor, centred: Hashable = None) -> None:
        """Count tokens in. Those `centred` under one name lose their common mean. Raises ShapeError."""
        _check(x, y)
        a, b = x.double(), y.double()
        self._gram.addmm_(a.mT, a)
        self._cross.addmm_(a.mT, b)
        if centred is not None:
            count, left, right = self._sums.get(centred, (0, 0, 0))
            self._sums[centred] = count + len(a), left + a.sum(0), right + b.sum(0)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """X^T X: (width, width) and X^T Y: (width, target), the means taken off."""
        gram, cross = self._gram.clone(), self._cross.clone()
        for count, left, right in self._sums.values():
            gram.addr_(left, left, alpha=-1 / count)
            cross.addr_(left, right, alpha=-1 / count)
        return gram, cross


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ShapeError(f"states of shapes {tuple(x.shape)} and {tuple(y.shape)} are not of the same tokens")


def ridge(moments: Moments, penalty: float = 1e-3) -> Tensor:
    """Least-squares map from x to y: (width, target), float64.

    Minimises ||X W - Y||_F^2 + penalty * tr(X^T X)/width * ||W||_F^2.
    """
    gram, cross = moments.matrices()
    scale = penalty * gram.trace() / gram.shape[0]
    gram.diagonal().add_(scale + 1e-12)
    return torch.linalg.solve(gram, cross)


def procrustes(moments: Moments) -> Tensor:
    """The map (width, target) with orthonormal columns (rows, where it is wide) that brings x nearest to y, float64.

    Orthogonal Procrustes problem (Schönemann 1966): with X^T Y = U S V^T, W = U V^T.
    """
    left, _, right = torch.linalg.svd(moments.matrices()[1], full_matrices=False)
    return left @ right


class Likeness:
    """Linear centred kernel alignment of every layer of one model with every layer of another.

    Summed over batches of tokens, each with the unbiased estimate of HSIC (Song et al. 2012, equation 5), as Nguyen,
    Raghu and Kornblith 2021 do: blind to rotation and scale, 1 for the same states, about 0 for unrelated ones.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._across = torch.zeros(rows, columns, dtype=torch.float64)
        self._batches = 0
        self._own = torch.zeros(rows, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)

    def add(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        """Count one batch in: the states (tokens, width) of every layer of both, four tokens or more.

        Raises ShapeError where they are not of the same tokens, or too few.
        """
        for x in rows:
            for y in columns:
                _check(x, y)
        if len(rows[0]) < 4:
            raise ShapeError(f"{len(rows[0])} tokens are too few to compare layers; four are the least")
        self._batches += 1
        a, b = ([_hollow(x) for x in side] for side in (rows, columns))
        for i, left in enumerate(a):
            self._own[0][i] += _hsic(left, left)
            for j, right in enumerate(b):
                self._across[i, j] += _hsic(left, right)
        for j, right in enumerate(b):
            self._own[1][j] += _hsic(right, right)

    @property
    def empty(self) -> bool:
        """Whether nothing was counted yet."""
        return self._batches == 0

    def matrix(self) -> list[list[float]]:
        """CKA by row and column; 0 where one side does not vary."""
        own = (self._own[0][:, None] * self._own[1]).clamp(min=0).sqrt()
        return torch.where(own > 0, self._across / own, 0.0).tolist()


def _hollow(x: Tensor) -> Tensor:
    """The Gram matrix of tokens, its diagonal zero; the states' mean, which counts for nothing, is taken off."""
    a = x.double()
    a = a - a.mean(0)
    return (a @ a.mT).fill_diagonal_(0)


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    n = len(k)
    trace, cross = (k * l).sum(), k.sum(0) @ l.sum(0)
    return (trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))
