"""The error on its way down the residual stream, and the norms that it passes.

The error at a stream's end is exact and at the large width. All that sublayers add to it on the way lies in the
directions that the Bridge has, but for what a LayerNorm's mean spreads over every channel alike. It is kept so, added
up at the Bridge's width, and made at the large width only where a module of the large model asks for it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from plugbridge.transfer.residual import Width


@dataclass(frozen=True)
class NarrowNorm:
    """A norm's weight w and bias b between the Bridge's channels; D is the down map.

    weight: D w and bias: D b, (Bridge hidden), none where the norm has none. times: D diag(w) D^T and over:
    D diag(1/w) D^T, with 0 for 1/0: (Bridge hidden, Bridge hidden), or their diagonals where D selects channels.
    """

    centred: bool
    weight: Tensor
    bias: Tensor | None
    times: Tensor
    over: Tensor


def narrow_norm(width: Width, norm: nn.Module, dtype: torch.dtype) -> NarrowNorm:
    """What a norm of the large model is between the Bridge's channels, in a dtype."""
    weight = norm.get_parameter("weight").detach().to(dtype)
    bias: Tensor | None = getattr(norm, "bias", None)
    return NarrowNorm(
        centred=width.layout.family.norm == "layernorm",
        weight=width.down(weight),
        bias=None if bias is None else width.down(bias.detach().to(dtype)),
        times=width.rescaling(weight),
        over=width.rescaling(weight.reciprocal().masked_fill(weight == 0, 0)),
    )


class StreamError:
    """The error at one place of a stream, of sublayers above it and of the stream's end.

    end: (n, length, large hidden), the exact error at the stream's end, in the dtype of the Bridge; it is not changed.
    """

    def __init__(self, width: Width, end: Tensor) -> None:
        self.width = width
        self.end = end
        self.low = width.down(end).contiguous()
        """(n, length, Bridge hidden): the error as the Bridge sees it."""
        self._added = torch.zeros_like(self.low)
        self._everywhere = end.new_zeros(*end.shape[:-1], 1)

    def wide(self) -> Tensor:
        """The error at the large width: (n, length, large hidden)."""
        return self.width.lift(self._added).add_(self._everywhere).add_(self.end)

    @cached_property
    def _ones(self) -> Tensor:
        return self.width.down(self.end.new_ones(self.end.shape[-1]))

    def pass_norm(self, norm: NarrowNorm, x: Tensor, inverse: Tensor, error: Tensor) -> None:
        """Add J^T lift(error), J a norm's Jacobian, from the norm's output as the Bridge sees it.

        x, error: (n, length, Bridge hidden), at the norm's output; inverse: (n, length, 1), its 1/rms or 1/std. The
        projections on the normalised input are taken in the Bridge's channels, whose directions are orthonormal; with
        an unpruned Bridge this is the norm's exact transposed Jacobian.
        """
        hidden = self.end.shape[-1]
        y = x if norm.bias is None else x - norm.bias
        inner = torch.linalg.vecdot(y, error).unsqueeze(-1) / hidden
        added = _rescaled(error * inverse, norm.times) + _rescaled(y * (inner * -inverse), norm.over)
        self._added += added
        if norm.centred:
            mean = (error @ norm.weight).unsqueeze(-1) * inverse / -hidden
            self._everywhere += mean
            added = torch.addcmul(added, mean, self._ones)
        self.low += added


def _rescaled(x: Tensor, scale: Tensor) -> Tensor:
    return x @ scale if scale.dim() == 2 else x * scale
