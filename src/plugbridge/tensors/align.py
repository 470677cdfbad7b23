"""Maps between the hidden states of two models, from the states of the same tokens. Pure functions."""

import torch
from torch import Tensor

from plugbridge.errors import ShapeError


def _check(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ShapeError(f"states of shapes {tuple(x.shape)} and {tuple(y.shape)} are not of the same tokens")


def ridge(x: Tensor, y: Tensor, penalty: float = 1e-3) -> Tensor:
    """Least-squares map from one model's states to the other's.

    Minimises ||X W - Y||_F^2 + penalty * tr(X^T X)/d * ||W||_F^2 in float64.
    x: (n, d), y: (n, e) -> W: (d, e) in x's dtype. Raises ShapeError.
    """
    _check(x, y)
    a, b = x.double(), y.double()
    gram = a.mT @ a
    scale = penalty * gram.trace() / gram.shape[0]
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return torch.linalg.solve(gram + (scale + 1e-12) * eye, a.mT @ b).to(x.dtype)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The map with orthonormal columns (rows, where d < e) that brings x nearest to y.

    Orthogonal Procrustes problem (Schönemann 1966): with X^T Y = U S V^T, W = U V^T.
    x: (n, d), y: (n, e) -> W: (d, e) in x's dtype. Raises ShapeError.
    """
    _check(x, y)
    left, _, right = torch.linalg.svd(x.double().mT @ y.double(), full_matrices=False)
    return (left @ right).to(x.dtype)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity of two models' states between 0 and 1, blind to rotation and scale.

    Linear centred kernel alignment (Kornblith et al. 2019, equation 4 with linear kernels).
    x: (n, d), y: (n, e). Raises ShapeError.
    """
    _check(x, y)
    a, b = x.double(), y.double()
    a, b = a - a.mean(0), b - b.mean(0)
    cross = (a.mT @ b).square().sum()
    own = (a.mT @ a).norm() * (b.mT @ b).norm()
    return float(cross / own) if float(own) > 0 else 0.0
