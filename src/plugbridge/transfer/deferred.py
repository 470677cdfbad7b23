"""A loss whose gradient is given, for modes that do not take it from autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Deferred(torch.autograd.Function):
    """A value whose backward pass is given: ``Deferred.apply(value, backward, *tensors)``.

    `backward` takes the gradient at the value and returns those at the tensors.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, backward: Callable[[Tensor], Sequence[Tensor | None]], *_: Tensor) -> Tensor:
        ctx.back = backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.back(factors[0])
