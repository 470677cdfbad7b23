"""Differentiating a function whose value nobody reads: its last matrix is not multiplied out going forward."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class _Unread(torch.autograd.Function):
    """Zeros in place of ``x @ weight + bias``, with its gradient at x. weight: (in, out), which gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None]:
        (error,) = errors
        return error @ ctx.saved_tensors[0].mT, None


@contextmanager
def unread(layer: nn.Module) -> Generator[None]:
    """While it lasts, a frozen linear layer gives zeros, whose gradient at its input is that of the true output.

    For a layer whose output is only added to: what comes after it must not depend on its value. Layers of other kinds
    stay as they are: quantised, wrapped by an adapter that reads their output, with a forward function of their own.
    """
    if type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer):
        yield
        return
    turned = type(layer) is nn.Linear  # which keeps (out, in)

    def forward(x: Tensor) -> Tensor:
        weight = layer.get_parameter("weight")
        return cast(Tensor, _Unread.apply(x, weight.mT if turned else weight))

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
