"""Layers that hold their weights in 8 or 4 bits: a stand-in whose memory can be traced.

bitsandbytes' own kernels take no fake tensors. A packed layer keeps what they keep, the codes and the scales, and
unpacks the whole weight whenever it is used, forward and backward (QLoRA, Dettmers et al. 2023). Its values mean
nothing.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.config import LoadIn
from plugbridge.families.spec import Layout
from plugbridge.memory.alive import note_used
from plugbridge.quantised import BLOCK, block_linears

BITS: dict[LoadIn, int] = {"8bit": 8, "4bit": 4}
"""Bits of a quantised weight."""


class _Product(torch.autograd.Function):
    """x times an unpacked weight; only the packed one is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        note_used(packed)
        return x @ x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        note_used(*ctx.saved_tensors)
        return gradient @ gradient.new_zeros(ctx.shape).mT, None, None


class Packed(nn.Linear):
    """A linear layer (inputs, outputs) with its weight in `bits` bits, and a scale a block (4) or output (8)."""

    scales: Tensor

    def __init__(self, shape: tuple[int, int], bits: int, bias: nn.Parameter | None, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.shape, (self.in_features, self.out_features) = shape, shape
        size = math.prod(shape)
        scales = size // BLOCK if bits == 4 else shape[1]
        codes = torch.zeros(size * bits // 8, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", torch.zeros(scales, device=device))
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        found = cast(Any, _Product).apply(input, self.weight, self.shape)
        return found if cast(Any, self.bias) is None else found + self.bias


def pack_weights(model: PreTrainedModel, layout: Layout, load_in: LoadIn) -> None:
    """Replace a model's block layers, those that `load_quantised` quantises, by packed ones."""
    bits = BITS[load_in]
    for path in block_linears(model, layout):
        layer = cast(Any, model.get_submodule(path))
        shape = tuple(layer.weight.shape)
        ins, outs = shape if layout.family.linear == "in out" else shape[::-1]
        model.set_submodule(path, Packed((ins, outs), bits, layer.bias, layer.weight.device))
    model.requires_grad_(False)
