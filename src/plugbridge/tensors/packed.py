"""Matrices of few bits: every weight one of a few levels, times a scale that 64 neighbours share.

In 4, 3 and 2 bits the levels are those of least squared error for a normal distribution (Max 1960; Lloyd 1982), in 8
bits they are evenly spaced. Codes are packed without gaps: 64 weights take 8 bytes a bit, and a byte for their scale.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

GROUP = 64
"""Neighbouring weights that share a scale."""
Bits = Literal[8, 4, 3, 2]
SCALE = torch.float8_e4m3fn
"""A scale's own precision: within 1/16 of the best one, whose effect on 2 to 4 bits is small."""
LARGEST = 448.0
"""The largest number in that precision."""
_HALF: dict[int, tuple[float, ...]] = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""Max (1960), table I: the positive half of the levels."""
_FEW = 2**4
"""Levels at most whose scales are fitted; those of more bits reach as far as the weights do."""
_AT_ONCE = 4
"""Weights that are unpacked by one look into a table."""
_PIECE = 2**22
"""Weights that are rounded at once, so that rounding takes little memory beside the matrix."""


def levels(bits: Bits) -> Tensor:
    """The levels of so many bits in units of the scale, ascending; (2**bits,), for 8 bits one less."""
    if bits == 8:
        return torch.arange(-127, 128, dtype=torch.float32) / 127
    half = torch.tensor(_HALF[bits])
    return torch.cat([-half.flip(0), half])


@dataclass(frozen=True)
class Packed:
    """A packed matrix. codes: (groups, 8 * bits) int8; scales: (groups,) int8, float8 bits; top: () float32.

    Bytes are int8 so that no code takes them for what it may convert to another precision. A scale is its float8 times
    `top`, a power of two. `shape` is that of the matrix, (rows, columns). Groups are neighbours in a row; its last one
    is filled up.
    """

    codes: Tensor
    scales: Tensor
    top: Tensor
    shape: torch.Size

    @property
    def bits(self) -> int:
        """Bits of a weight, its share of the scale left out."""
        return self.codes.shape[-1] // 8

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.top.nbytes

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in `dtype`, of `shape`."""
        return unpack(self.codes, self.scales, self.top, self.shape, dtype)


def packed_shapes(shape: torch.Size, bits: Bits) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a packed matrix's parts, by their names."""
    groups = shape[0] * -(-shape[1] // GROUP)
    return {"codes": ((groups, 8 * bits), torch.int8), "scales": ((groups,), torch.int8), "top": ((), torch.float32)}


@torch.no_grad()
def pack(matrix: Tensor, bits: Bits) -> Packed:
    """A matrix rounded to the nearest levels, with scales of least squared error."""
    groups, real = grouped(matrix.detach()), real_places(matrix.shape[-1], matrix.device)
    grid = grid_of(bits, groups.device)
    rows = max(1, _PIECE // real.numel())
    pieces = groups.split(rows * len(real))
    found = torch.cat([best_scales(piece.float(), grid, real.repeat(len(piece) // len(real), 1)) for piece in pieces])
    top = power_of_two(found.amax())
    scales = to_scales(found, top)
    each = zip(pieces, read_scales(scales, top).split(rows * len(real)), strict=True)
    codes = torch.cat([join(nearest(piece.float(), scale, grid), bits) for piece, scale in each])
    return Packed(codes, scales, top, matrix.shape)


def real_places(columns: int, device: torch.device) -> Tensor:
    """Which places of a row's groups hold weights, as ones, and which only fill it up, as zeros: (groups, 64)."""
    return grouped(torch.ones(1, columns, device=device))


def grouped(matrix: Tensor) -> Tensor:
    """A matrix's weights, group by group, each row filled up with zeros: (groups, 64)."""
    missing = -matrix.shape[-1] % GROUP
    return (nn.functional.pad(matrix, (0, missing)) if missing else matrix).reshape(-1, GROUP)


def power_of_two(most: Tensor) -> Tensor:
    """The power of two by which scales up to `most` are divided, so that none is too large for eight bits."""
    floor = torch.finfo(torch.float32).tiny
    return torch.exp2(torch.ceil(torch.log2(most.float().clamp_min(floor) / LARGEST)))


def to_scales(scales: Tensor, top: Tensor) -> Tensor:
    """Scales (groups,) divided by `top`, in eight bits; what is too large still is the largest there is."""
    return (scales.float() / top).clamp_max(LARGEST).to(SCALE).view(torch.int8)


def read_scales(scales: Tensor, top: Tensor) -> Tensor:
    """Scales as far as eight bits hold them; (groups,) float32."""
    return scales.view(SCALE).float() * top.float()


class Grid(NamedTuple):
    """The levels of so many bits, ascending, and what lies halfway between neighbours; float32."""

    levels: Tensor
    between: Tensor


def grid_of(bits: Bits, device: torch.device) -> Grid:
    """The grid of so many bits."""
    found = levels(bits).to(device)
    return Grid(found, (found[1:] + found[:-1]) / 2)


def nearest(groups: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The level nearest to every weight, by its number: (n, 64) int32. groups: (n, 64) float32; scales: (n,)."""
    safe = scales.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.bucketize(groups / safe.unsqueeze(-1), grid.between, out_int32=True)


def best_scales(groups: Tensor, grid: Grid, real: Tensor | None) -> Tensor:
    """Scales of least squared error with the nearest levels, found by turns. groups: (n, 64). Returns (n,).

    Of a group only its `real` places count, (n, 64); all of them where it is None.
    """
    if len(grid.levels) > _FEW:
        return groups.abs().amax(-1) * (17 / 16)  # no weight is beyond the ends, however the scale is rounded
    scales = (groups.square().sum(-1) / (GROUP if real is None else real.sum(-1))).sqrt_()
    for _ in range(4):
        chosen = grid.levels[nearest(groups, scales, grid)]
        if real is not None:
            chosen *= real
        scales = torch.linalg.vecdot(groups, chosen) / torch.linalg.vecdot(chosen, chosen)
    return scales.clamp_min_(0)


def join(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, 64) as bytes without gaps: (n, 8 * bits) int8, the first code in the lowest bits."""
    if bits == 8:
        return codes.to(torch.uint8).view(torch.int8)
    eights = codes.view(*codes.shape[:-1], -1, 8).long()
    word = sum(eights[..., i] << (bits * i) for i in range(8))
    assert isinstance(word, Tensor)
    return torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], -1).to(torch.uint8).flatten(-2).view(torch.int8)


_TABLES: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def _table(codes: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """The levels of every four neighbouring codes, by the number that their bits make; (2 ** (4 bits), 4).

    Made once; fake tensors have theirs once a trace.
    """
    made, world = _TABLES, cast(Any, getattr(codes, "fake_mode", None))
    if world is not None:
        made = getattr(world, "packed_tables", {})
        world.packed_tables = made
    key = bits, codes.device, dtype
    if key not in made:
        number = torch.arange(2 ** (bits * _AT_ONCE), device=codes.device)
        parts = torch.stack([(number >> (bits * i)) & (2**bits - 1) for i in range(_AT_ONCE)], -1)
        made[key] = levels(bits).to(codes.device, dtype)[parts]
    return made[key]


def unpack(codes: Tensor, scales: Tensor, top: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The matrix that these codes (groups, 8 * bits) and scales (groups,) stand for, in `dtype`."""
    bits = codes.shape[-1] // 8
    if bits == 8:
        found = (codes.view(torch.uint8).to(dtype) - 127).div_(127)
    else:
        table = _table(codes, cast(Bits, bits), dtype)
        found = nn.functional.embedding(_numbers(codes.view(torch.uint8), bits), table)
    found = found.view(-1, GROUP).mul_(read_scales(scales, top).to(dtype).unsqueeze(-1))
    return found.view(shape[0], -1)[:, : shape[1]]


def _numbers(codes: Tensor, bits: int) -> Tensor:
    """The bits of every four neighbouring codes as one number; int32, a quarter as many as there are weights."""
    flat = codes.reshape(-1)
    if bits == 2:
        return flat.int()
    if bits == 4:
        return flat.view(torch.int16).int() & 0xFFFF
    first, second, third = flat.view(-1, 3).int().unbind(-1)
    return torch.stack([first | ((second & 15) << 8), (second >> 4) | (third << 4)], -1).view(-1)
