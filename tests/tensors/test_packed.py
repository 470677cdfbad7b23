"""Packed matrices: the levels are the best ones, rounding is to the nearest, no bit is lost or wasted."""

import math

import pytest
import torch

from plugbridge.tensors.packed import (
    GROUP,
    Bits,
    grid_of,
    join,
    levels,
    nearest,
    pack,
    packed_shapes,
    power_of_two,
    read_scales,
    to_scales,
    unpack,
)

ALL: tuple[Bits, ...] = (8, 4, 3, 2)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_levels_are_those_of_least_squared_error_for_a_normal_distribution(bits: Bits) -> None:
    """Lloyd (1982): each is the mean of what is nearer to it than to its neighbours."""
    grid = levels(bits).double()
    assert grid.numel() == 2**bits
    ends = torch.cat([torch.tensor([-math.inf]), (grid[1:] + grid[:-1]) / 2, torch.tensor([math.inf])]).double()
    density = torch.exp(-(ends**2) / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(ends)
    means = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    assert torch.allclose(grid, means, atol=2e-4)


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("shape", [(48, 64), (7, 50), (1, 3)])
def test_every_weight_is_its_nearest_level_times_its_groups_scale(bits: Bits, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = pack(matrix, bits)
    found = packed.unpack()
    assert found.shape == matrix.shape
    scales = read_scales(packed.scales, packed.top).repeat_interleave(GROUP).view(shape[0], -1)[:, : shape[1]]
    away = (matrix.unsqueeze(-1) - levels(bits) * scales.unsqueeze(-1)).abs()
    assert torch.allclose((found - matrix).abs(), away.amin(-1), atol=1e-6)
    assert packed.bits == bits


@pytest.mark.parametrize(("bits", "wanted"), [(8, 0.0062), (4, 0.094), (3, 0.18), (2, 0.34)])
def test_error_and_bytes_are_those_of_so_many_bits(bits: Bits, wanted: float) -> None:
    """The relative error of normal weights is near the distribution's own, 0.0975, 0.186 and 0.343 (Max 1960)."""
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    packed = pack(matrix, bits)
    assert float((packed.unpack() - matrix).norm() / matrix.norm()) == pytest.approx(wanted, rel=0.15)
    assert packed.nbytes == matrix.numel() * bits // 8 + matrix.numel() // GROUP + 4
    parts = {"codes": packed.codes, "scales": packed.scales, "top": packed.top}
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == packed_shapes(matrix.shape, bits)


@pytest.mark.parametrize("bits", ALL)
def test_what_was_rounded_stays_as_it_is(bits: Bits) -> None:
    once = pack(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), bits)
    twice = pack(once.unpack(), bits)
    assert torch.allclose(twice.unpack(), once.unpack(), rtol=0.07, atol=0.02)  # a scale's own rounding, once more


@pytest.mark.parametrize("bits", ALL)
def test_codes_fill_every_bit(bits: Bits) -> None:
    """Every code at every place of a group comes back."""
    grid = levels(bits)
    number = torch.arange(GROUP * grid.numel()) * 7 % grid.numel()
    top = power_of_two(torch.ones(()))
    scales = to_scales(torch.ones(grid.numel()), top)
    groups = grid[number].view(-1, GROUP)
    codes = nearest(groups, read_scales(scales, top), grid_of(bits, groups.device))
    assert torch.equal(codes.flatten().long(), number)
    assert torch.allclose(unpack(join(codes, bits), scales, top, groups.shape, torch.float32), groups)


def test_scales_are_kept_within_a_sixteenth() -> None:
    scales = torch.cat([torch.rand(1000) * 3 + 0.02, torch.zeros(1)])
    top = power_of_two(scales.amax())
    kept = to_scales(scales, top)
    assert float(torch.log2(top)) == round(float(torch.log2(top)))
    assert torch.allclose(read_scales(kept, top), scales, rtol=1 / 16)


def test_zeros_and_halves_are_packed() -> None:
    assert torch.equal(pack(torch.zeros(4, 64), 2).unpack(), torch.zeros(4, 64))
    half = pack(torch.randn(4, 64).bfloat16(), 4)
    assert half.unpack(torch.bfloat16).dtype == torch.bfloat16
    assert float(half.unpack(torch.float64).float().sub(half.unpack()).abs().max()) < 1e-6


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("columns", [8, 72, 96])
def test_what_fills_a_row_up_does_not_count(bits: Bits, columns: int) -> None:
    """The last group is rounded as well as if it were whole: as its weights alone, repeated, would be."""
    matrix = torch.randn(40, columns, generator=torch.Generator().manual_seed(0))
    last = columns % GROUP
    alone = matrix[:, -last:].repeat(1, GROUP // last)
    assert torch.allclose(pack(matrix, bits).unpack()[:, -last:], pack(alone, bits).unpack()[:, :last], rtol=0.07)
