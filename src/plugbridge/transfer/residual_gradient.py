"""The loss's gradient on its way down the residual stream, and the norms that it passes.

At a stream's end it is exact and at the large width. All that sublayers add to it on the way is kept at the Bridge's
width, in the directions that the Bridge has, but for what a LayerNorm's mean spreads over every channel alike; it is
made at the large width only where a module of the large model asks for it.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from plugbridge.tensors.axes import Project
from plugbridge.transfer.residual import Width


class NarrowNorm:
    """The transposed Jacobian of a norm of the large model, between the Bridge's channels.

    With D the down map and w, b the norm's weight and bias, y its output less b, as the Bridge sees it, and s its
    1/rms or 1/std, an error e at the norm's output becomes, H being the large hidden size,

        s (D diag(w) D^T e - D diag(1/w) D^T y <y, e> / H)

    and for a LayerNorm -s <D w, e> / H in every channel of the large model more. The normalised input is taken as
    diag(1/w) D^T y: projections on it are those in the Bridge's channels, whose directions are orthonormal. With an
    unpruned Bridge this is exact. 1/0 counts as 0. `keep` makes the two matrices between the Bridge's channels at once,
    to stay.
    """

    def __init__(self, width: Width, norm: nn.Module, dtype: torch.dtype, keep: bool = False) -> None:
        self.width = width
        self.weight = norm.get_parameter("weight").detach().to(dtype)
        self.reciprocal = self.weight.reciprocal().masked_fill(self.weight == 0, 0)
        bias: Tensor | None = getattr(norm, "bias", None)
        self.low_weight = width.down(self.weight)
        self.low_bias = None if bias is None else width.down(bias.detach().to(dtype))
        self.kept = self._matrices() if keep else None

    def backward(self, x: Tensor, inverse: Tensor, error: Tensor) -> tuple[Tensor, Tensor | None]:
        """What an error at the norm's output is at its input, and for a LayerNorm what it is in every channel besides.

        x, error: (n, length, Bridge hidden), at the norm's output; inverse: (n, length, 1), its 1/rms or 1/std. Returns
        (n, length, Bridge hidden) and (n, length, 1).
        """
        hidden = self.width.layout.sizes["hidden"]
        y = x if self.low_bias is None else x - self.low_bias
        inner = torch.linalg.vecdot(y, error).unsqueeze(-1) / hidden
        added = self._scaled(error * inverse, y * (inner * -inverse))
        if self.width.layout.family.norm != "layernorm":
            return added, None
        return added, (error @ self.low_weight).unsqueeze(-1) * inverse / -hidden

    def _scaled(self, by_weight: Tensor, by_reciprocal: Tensor) -> Tensor:
        width, weight, reciprocal = self.width, self.weight, self.reciprocal
        if not isinstance(width.plan.op("hidden"), Project):
            return by_weight * self.low_weight + by_reciprocal * width.down(reciprocal)
        matrices = self.kept
        if matrices is None and self._many(by_weight):
            matrices = self._matrices()
        if matrices is not None:
            return by_weight @ matrices[0] + by_reciprocal @ matrices[1]
        return width.down(width.lift(by_weight) * weight + width.lift(by_reciprocal) * reciprocal)

    def _many(self, x: Tensor) -> bool:
        """Whether two matrices between the Bridge's channels cost less than to go through the large width."""
        tokens, low, high = x[..., 0].numel(), x.shape[-1], self.weight.shape[-1]
        return 2 * low * (low * high + tokens * low) < 3 * tokens * low * high

    def _matrices(self) -> tuple[Tensor, Tensor] | None:
        """D diag(w) D^T and D diag(1/w) D^T, each (Bridge hidden, Bridge hidden); none where D selects channels."""
        op = self.width.plan.op("hidden")
        if not isinstance(op, Project):
            return None
        matrix = op.matrix.to(self.weight.device, torch.promote_types(self.weight.dtype, torch.float32))
        scales = (self.weight.to(matrix.dtype), self.reciprocal.to(matrix.dtype))
        one, two = (((matrix * scale) @ matrix.mT).to(self.weight.dtype) for scale in scales)
        return one, two


class ResidualGradient:
    """The loss's gradient at one place of a stream, on the way down from the stream's end.

    end: (n, length, large hidden), exact, in the Bridge's dtype; it is not changed.
    """

    def __init__(self, width: Width, end: Tensor) -> None:
        self.width = width
        self.end = end
        self._added: Tensor | None = None
        self._everywhere: Tensor | None = None

    @cached_property
    def _low_end(self) -> Tensor:
        return self.width.down(self.end).contiguous()

    @cached_property
    def _low_ones(self) -> Tensor:
        return self.width.down(self.end.new_ones(self.end.shape[-1]))

    def low(self) -> Tensor:
        """As the Bridge sees it: (n, length, Bridge hidden)."""
        found = self._low_end if self._added is None else self._low_end + self._added
        return found if self._everywhere is None else torch.addcmul(found, self._everywhere, self._low_ones)

    def wide(self) -> Tensor:
        """At the large width: (n, length, large hidden)."""
        found = self.end if self._added is None else self.width.lift(self._added).add_(self.end)
        return found if self._everywhere is None else found.add_(self._everywhere)

    def add(self, low: Tensor, everywhere: Tensor | None) -> None:
        """Add a gradient at the Bridge's width, (n, length, Bridge hidden), and one in all channels, (n, length, 1)."""
        self._added = low if self._added is None else self._added.add_(low)
        if everywhere is not None:
            self._everywhere = everywhere if self._everywhere is None else self._everywhere.add_(everywhere)
