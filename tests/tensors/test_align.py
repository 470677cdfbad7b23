"""Maps between states: exact on exact data, equal to a reference elsewhere, blind to what they should not see."""

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from plugbridge.errors import ShapeError
from plugbridge.tensors.align import linear_cka, procrustes, ridge

WIDTHS = [(5, 5), (4, 7), (7, 4)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Orthonormal columns, or rows where there are fewer of them."""
    basis = torch.linalg.qr(_random(max(rows, columns), min(rows, columns), seed=seed)).Q
    return basis if rows >= columns else basis.mT


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_ridge_recovers_an_exact_map(d: int, e: int) -> None:
    x, wanted = _random(40, d), _random(d, e, seed=1)
    assert torch.allclose(ridge(x, x @ wanted, penalty=0), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("d", "e"), WIDTHS)
@pytest.mark.parametrize("penalty", [1e-3, 0.7])
def test_ridge_is_ridge_regression_with_a_penalty_relative_to_the_states(d: int, e: int, penalty: float) -> None:
    x, y = 30 * _random(40, d), _random(40, e, seed=1)
    alpha = penalty * float(x.square().sum()) / d
    wanted = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy()).coef_.T
    assert torch.allclose(ridge(x, y, penalty), torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)
    assert torch.allclose(ridge(7 * x, 7 * y, penalty), ridge(x, y, penalty), rtol=1e-9, atol=1e-12)


def test_ridge_of_fewer_tokens_than_channels_is_finite() -> None:
    x, y = _random(3, 8), _random(3, 5, seed=1)
    found = ridge(x, y, penalty=1e-6)
    assert torch.allclose(x @ found, y, atol=1e-4)
    assert float(found.norm()) < 2 * float((torch.linalg.pinv(x) @ y).norm())  # of all that fit, a short one


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_procrustes_recovers_a_rotation(d: int, e: int) -> None:
    wanted = _orthonormal(d, e)
    x = _random(40, d, seed=1) if d <= e else _random(40, e, seed=1) @ wanted.mT  # what is mapped to must be there
    assert torch.allclose(procrustes(x, x @ wanted), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_procrustes_is_orthonormal_whatever_the_states(d: int, e: int) -> None:
    found = procrustes(_random(40, d), _random(40, e, seed=1))
    assert found.shape == (d, e)
    gram = found.mT @ found if d >= e else found @ found.mT
    assert torch.allclose(gram, torch.eye(min(d, e), dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_orthogonal_map_comes_nearer_than_procrustes() -> None:
    x, y = _random(40, 5), _random(40, 5, seed=1)
    best = float((x @ procrustes(x, y) - y).norm())
    others = [float((x @ _orthonormal(5, 5, seed) - y).norm()) for seed in range(2, 60)]
    near = procrustes(x, y) @ torch.linalg.matrix_exp(1e-2 * (_random(5, 5) - _random(5, 5).mT))
    assert best < min(others)
    assert best < float((x @ near - y).norm())


def test_cka_is_one_for_rotated_scaled_and_shifted_states() -> None:
    x = _random(40, 5)
    for rotation in (torch.eye(5, dtype=torch.float64), _orthonormal(5, 5, 1), _orthonormal(5, 9, 1)):
        assert linear_cka(x, -3.5 * x @ rotation + 2) == pytest.approx(1, abs=1e-12)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    x, y = _random(40, 5), _random(40, 7, seed=1) + _random(40, 5)[:, :1]
    plain = linear_cka(x, y)
    assert 0.05 < plain < 0.95
    assert linear_cka(y, x) == pytest.approx(plain, abs=1e-12)
    assert linear_cka(0.1 * x @ _orthonormal(5, 5) - 1, 9 * y @ _orthonormal(7, 7) + 4) == pytest.approx(plain)
    assert linear_cka(x @ _random(5, 5, seed=3), y) != pytest.approx(plain, rel=1e-3)  # but sees a linear map


def test_cka_is_the_normalised_hsic_of_the_gram_matrices() -> None:
    """Kornblith et al. 2019, equations 3 and 4."""
    x, y = _random(30, 5), _random(30, 7, seed=1)
    centring = torch.eye(30, dtype=torch.float64) - 1 / 30

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ a.mT @ centring @ b @ b.mT @ centring)

    assert linear_cka(x, y) == pytest.approx(float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()), abs=1e-12)


def test_cka_is_between_nothing_and_one() -> None:
    basis = torch.linalg.qr(torch.cat([torch.ones(20, 1, dtype=torch.float64), _random(20, 8)], 1)).Q[:, 1:]
    assert linear_cka(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-12)  # centred, nothing in common
    assert linear_cka(torch.ones(20, 3), basis) == 0.0
    found = [linear_cka(_random(6, 3, seed=seed), _random(6, 4, seed=seed + 100)) for seed in range(50)]
    assert all(0 <= value <= 1 for value in found)
    assert max(found) - min(found) > 0.2


@pytest.mark.parametrize("align", [ridge, procrustes])
def test_maps_have_the_states_dtype_and_float64_inside(align) -> None:
    x, y = 1e3 + _random(200, 4), _random(200, 4, seed=1)
    found = align(x.float(), y.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), align(x.float().double(), y.float().double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("align", [ridge, procrustes, linear_cka])
@pytest.mark.parametrize(("x", "y"), [((4, 3), (5, 3)), ((4,), (4, 3)), ((4, 3), (4,)), ((2, 4, 3), (2, 4, 3))])
def test_states_of_other_tokens_are_refused(align, x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="are not of the same tokens") as caught:
        align(torch.ones(x), torch.ones(y))
    assert str(x) in str(caught.value)
    assert str(y) in str(caught.value)
    assert "\n" not in str(caught.value)
