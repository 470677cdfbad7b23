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

    With D the down map and w, b the norm's weight and bias, u the normalised input, y = w u what the norm gives less b,
    and s its 1/rms or 1/std, an error e at the norm's output becomes, H being the large hidden size,

        s (D diag(w) D^T e - D u <D y, e> / H)

    and for a LayerNorm -s <D w, e> / H in every channel of the large model more. D u and D y are as the forward pass
    had them: nothing is divided by a weight, which may be 0. `keep` makes the matrix D diag(w) D^T between the
    Bridge's channels at once, to stay.
    """

    def __init__(self, width: Width, norm: nn.Module, dtype: torch.dtype, keep: bool = False) -> None:
        self.width = width
        self.weight = norm.get_parameter("weight").detach().to(dtype)
        bias: Tensor | None = getattr(norm, "bias", None)
        self.low_weight = width.down(self.weight)
        self.low_bias = None if bias is None else width.down(bias.detach().to(dtype))
        self.kept = self._matrix() if keep else None

    def backward(self, x: Tensor, unit: Tensor, inverse: Tensor, error: Tensor) -> tuple[Tensor, Tensor | None]:
        """What an error at the norm's output is at its input, and for a LayerNorm what it is in every channel besides.

        x, error: (n, length, Bridge hidden), at the norm's output; unit: (n, length, Bridge hidden), its normalised
        input; inverse: (n, length, 1), its 1/rms or 1/std. Returns (n, length, Bridge hidden) and (n, length, 1).
        """
        hidden = self.width.layout.sizes["hidden"]
        y = x if self.low_bias is None else x - self.low_bias
        inner = torch.linalg.vecdot(y, error).unsqueeze(-1) / hidden
        added = self._weighted(error * inverse).addcmul_(unit, inner * -inverse)
        if self.width.layout.family.norm != "layernorm":
            return added, None
        return added, (error @ self.low_weight).unsqueeze(-1) * inverse / -hidden

    def _weighted(self, error: Tensor) -> Tensor:
        """D diag(w) D^T error, in memory of its own."""
        width = self.width
        if not isinstance(width.plan.op("hidden"), Project):
            return error * self.low_weight
        matrix = self.kept
        if matrix is None and self._many(error):
            matrix = self._matrix()
        return error @ matrix if matrix is not None else width.down(width.lift(error) * self.weight)

    def _many(self, x: Tensor) -> bool:
        """Whether a matrix between the Bridge's channels costs less than to go through the large width."""
        tokens, low, high = x[..., 0].numel(), x.shape[-1], self.weight.shape[-1]
        return low * (low * high + tokens * low) < 2 * tokens * low * high

    def _matrix(self) -> Tensor | None:
        """D diag(w) D^T, (Bridge hidden, Bridge hidden); none where D selects channels."""
        op = self.width.plan.op("hidden")
        if not isinstance(op, Project):
            return None
        matrix = op.matrix.to(self.weight.device, torch.promote_types(self.weight.dtype, torch.float32))
        return ((matrix * self.weight.to(matrix.dtype)) @ matrix.mT).to(self.weight.dtype)


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
