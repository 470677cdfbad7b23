"""Rounding for the vectors that come: never worse for them than rounding to nearest, much better where they are few."""

import pytest
import torch

from plugbridge.shrink.rounding import calibrated, loss
from plugbridge.tensors.packed import Bits, pack


def _vectors(count: int, rows: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Vectors most of which lies in a few directions, as errors do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(count, rank, generator=generator) @ torch.randn(rank, rows, generator=generator)
    return few + 0.1 * torch.randn(count, rows, generator=generator)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (40, 50)])
def test_products_with_the_vectors_are_nearer(bits: Bits, rows: int, columns: int) -> None:
    matrix = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    seen, unseen = _vectors(64, rows, 6), _vectors(64, rows, 6, seed=0)[32:]
    found, plain = calibrated(matrix, bits, seen[:32]), pack(matrix, bits)
    assert loss(matrix, found, seen[:32]) < 0.5 * loss(matrix, plain, seen[:32])
    assert loss(matrix, found, unseen) < loss(matrix, plain, unseen)  # of the same directions
    assert found.codes.shape == plain.codes.shape
    assert found.nbytes == plain.nbytes
    assert loss(matrix, found, torch.eye(rows)) < 8 * loss(matrix, plain, torch.eye(rows))


@pytest.mark.parametrize("seed", range(5))
def test_it_never_raises_the_loss_against_the_nearest_levels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(24, 64, generator=generator)
    one = torch.eye(24)[seed : seed + 1]
    for vectors in (torch.randn(3, 24, generator=generator), torch.eye(24), one):
        assert loss(matrix, calibrated(matrix, 2, vectors), vectors) <= loss(matrix, pack(matrix, 2), vectors)


def test_one_direction_is_kept_almost_exactly() -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    vector = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    assert loss(matrix, calibrated(matrix, 2, vector, 1e-4), vector) < 0.01 * loss(matrix, pack(matrix, 2), vector)


def test_without_vectors_it_is_the_nearest() -> None:
    matrix = torch.randn(16, 64)
    for vectors in (None, torch.zeros(3, 16), torch.full((3, 16), torch.nan), torch.full((3, 16), torch.inf)):
        assert torch.equal(calibrated(matrix, 3, vectors).unpack(), pack(matrix, 3).unpack())


def test_the_size_of_dependent_vectors_does_not_matter() -> None:
    matrix = torch.randn(16, 64)
    for size in (1e-30, 1e-20, 1.0, 1e30):
        found = calibrated(matrix, 3, size * torch.ones(4, 16))
        assert torch.equal(found.unpack(), calibrated(matrix, 3, torch.ones(4, 16)).unpack())
