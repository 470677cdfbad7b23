"""Maps between states: exact on exact data, equal to a reference elsewhere, blind to what they should not see."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from plugbridge.errors import ShapeError
from plugbridge.tensors.align import Likeness, Moments, _hollow, _hsic, procrustes, ridge

WIDTHS = [(5, 5), (4, 7), (7, 4)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Orthonormal columns, or rows where there are fewer of them."""
    basis = torch.linalg.qr(_random(max(rows, columns), min(rows, columns), seed=seed)).Q
    return basis if rows >= columns else basis.mT


def _moments(x: Tensor, y: Tensor) -> Moments:
    """Sums over all tokens at once."""
    found = Moments(x.shape[1], y.shape[1])
    found.add(x, y)
    return found


def _cka(x: Tensor, y: Tensor, batch: int | None = None) -> float:
    """CKA of one layer with another, all tokens at once or so many at a time."""
    likeness = Likeness(1, 1)
    for a, b in zip(x.split(batch or len(x)), y.split(batch or len(y)), strict=True):
        likeness.add([a], [b])
    return likeness.matrix()[0][0]


def test_tokens_may_come_in_any_number_of_parts_and_lose_their_means() -> None:
    x, y = 5 + _random(40, 4), _random(40, 7, seed=1) - 3
    parts, named = Moments(4, 7), Moments(4, 7)
    for start, end in ((0, 3), (3, 30), (30, 40)):
        parts.add(x[start:end], y[start:end])
        named.add(x[start:end], y[start:end], "low" if end <= 30 else "high")
    for one, other in zip(parts.matrices(), (x.mT @ x, x.mT @ y), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    a, b = (torch.cat([z[:30] - z[:30].mean(0), z[30:] - z[30:].mean(0)]) for z in (x, y))
    for _ in range(2):  # reading the sums leaves them as they are
        for one, other in zip(named.matrices(), (a.mT @ a, a.mT @ b), strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_ridge_recovers_an_exact_map(d: int, e: int) -> None:
    x, wanted = _random(40, d), _random(d, e, seed=1)
    assert torch.allclose(ridge(_moments(x, x @ wanted), penalty=0), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("d", "e"), WIDTHS)
@pytest.mark.parametrize("penalty", [1e-3, 0.7])
def test_ridge_is_ridge_regression_with_a_penalty_relative_to_the_states(d: int, e: int, penalty: float) -> None:
    x, y = 30 * _random(40, d), _random(40, e, seed=1)
    alpha = penalty * float(x.square().sum()) / d
    wanted = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy()).coef_.T
    assert torch.allclose(ridge(_moments(x, y), penalty), torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)
    assert torch.allclose(ridge(_moments(7 * x, 7 * y), penalty), ridge(_moments(x, y), penalty), rtol=1e-9, atol=1e-12)


def test_ridge_of_fewer_tokens_than_channels_is_finite() -> None:
    x, y = _random(3, 8), _random(3, 5, seed=1)
    found = ridge(_moments(x, y), penalty=1e-6)
    assert torch.allclose(x @ found, y, atol=1e-4)
    assert float(found.norm()) < 2 * float((torch.linalg.pinv(x) @ y).norm())  # of all that fit, a short one


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_procrustes_recovers_a_rotation(d: int, e: int) -> None:
    wanted = _orthonormal(d, e)
    x = _random(40, d, seed=1) if d <= e else _random(40, e, seed=1) @ wanted.mT  # what is mapped to must be there
    assert torch.allclose(procrustes(_moments(x, x @ wanted)), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("d", "e"), WIDTHS)
def test_procrustes_is_orthonormal_whatever_the_states(d: int, e: int) -> None:
    found = procrustes(_moments(_random(40, d), _random(40, e, seed=1)))
    assert found.shape == (d, e)
    gram = found.mT @ found if d >= e else found @ found.mT
    assert torch.allclose(gram, torch.eye(min(d, e), dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_orthogonal_map_comes_nearer_than_procrustes() -> None:
    x, y = _random(40, 5), _random(40, 5, seed=1)
    best = float((x @ procrustes(_moments(x, y)) - y).norm())
    others = [float((x @ _orthonormal(5, 5, seed) - y).norm()) for seed in range(2, 60)]
    near = procrustes(_moments(x, y)) @ torch.linalg.matrix_exp(1e-2 * (_random(5, 5) - _random(5, 5).mT))
    assert best < min(others)
    assert best < float((x @ near - y).norm())


@pytest.mark.parametrize("batch", [None, 8])
def test_cka_is_one_for_rotated_scaled_and_shifted_states(batch: int | None) -> None:
    x = _random(40, 5)
    for rotation in (torch.eye(5, dtype=torch.float64), _orthonormal(5, 5, 1), _orthonormal(5, 9, 1)):
        assert _cka(x, -3.5 * x @ rotation + 2, batch) == pytest.approx(1, abs=1e-12)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    x, y = _random(40, 5), _random(40, 7, seed=1) + _random(40, 5)[:, :1]
    plain = _cka(x, y)
    assert 0.05 < plain < 0.95
    assert _cka(y, x) == pytest.approx(plain, abs=1e-12)
    assert _cka(0.1 * x @ _orthonormal(5, 5) - 1, 9 * y @ _orthonormal(7, 7) + 4) == pytest.approx(plain)
    assert _cka(x @ _random(5, 5, seed=3), y) != pytest.approx(plain, rel=1e-3)  # but sees a linear map


def test_cka_of_many_tokens_is_kornbliths() -> None:
    """Kornblith et al. 2019, equations 3 and 4: the estimates differ by what is lost with few tokens."""
    x = _random(3000, 4)
    y = torch.cat([x[:, :2], _random(3000, 5, seed=1)], 1)
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = float((a.mT @ b).square().sum() / ((a.mT @ a).norm() * (b.mT @ b).norm()))
    assert wanted > 0.2
    assert _cka(x, y) == pytest.approx(wanted, abs=2e-3)
    assert _cka(x, y, 100) == pytest.approx(wanted, abs=1e-2)


def test_hsic_is_unbiased_where_there_is_nothing_in_common() -> None:
    """Few tokens of wide states look alike to the biased estimate; the mean of many unbiased ones is nothing."""
    found = [_cka(_random(8, 20, seed=seed), _random(8, 20, seed=seed + 1000)) for seed in range(200)]
    assert abs(sum(found) / len(found)) < 0.03
    assert min(found) < 0 < max(found)


def test_hsic_is_the_mean_over_all_four_different_tokens() -> None:
    """Song et al. 2012, equation 5, is the U-statistic of equation 3: summed over every ordered choice of four."""
    x, y = _random(6, 3), _random(6, 4, seed=1)
    k, l = x @ x.mT, y @ y.mT  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert float(_hsic(_hollow(x), _hollow(y))) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-9)


def test_states_that_do_not_vary_are_like_nothing() -> None:
    likeness = Likeness(2, 1)
    likeness.add([torch.ones(20, 3), _random(20, 3)], [_random(20, 3)])
    assert likeness.matrix() == [[0.0], [pytest.approx(1)]]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 tokens are too few to compare layers; four are the least"):
        _cka(_random(3, 2), _random(3, 2))


@pytest.mark.parametrize("fit", [ridge, procrustes])
def test_maps_are_float64_inside(fit: Callable[[Moments], Tensor]) -> None:
    x, y = 1e3 + _random(200, 4), _random(200, 4, seed=1)
    assert torch.equal(fit(_moments(x.float(), y.float())), fit(_moments(x.float().double(), y.float().double())))


def _ridge(x: Tensor, y: Tensor) -> None:
    ridge(_moments(x, y))


@pytest.mark.parametrize("use", [_ridge, _cka])
@pytest.mark.parametrize(("x", "y"), [((4, 3), (5, 3)), ((4, 3), (4, 3, 1)), ((2, 4, 3), (2, 4, 3))])
def test_states_of_other_tokens_are_refused(
    use: Callable[[Tensor, Tensor], object], x: tuple[int, ...], y: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="are not of the same tokens") as caught:
        use(torch.ones(x), torch.ones(y))
    assert str(x) in str(caught.value)
    assert str(y) in str(caught.value)
    assert "\n" not in str(caught.value)
