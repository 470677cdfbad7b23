"""Models whose blocks' matrices are packed in few bits (`tensors.packed`), unpacked one at a time where they are used.

A directory of such a model loads as any other does, `AutoModelForCausalLM.from_pretrained(folder)`, once this module is
imported: its configuration names the quantiser that is registered here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from plugbridge.families.spec import Layout, layout_of_config
from plugbridge.models import PACKED, find_checkpoint, load_model
from plugbridge.streaming import load_streamed
from plugbridge.tensors.packed import GROUP, Bits, Packed, pack, packed_shapes, unpack

PARTS = {"codes": "weight", "scales": "scales", "top": "top"}
"""The parts of a packed matrix, and what a layer's parameters of them are called."""
Order = Literal["out in", "in out"]
"""How a packed matrix lies in memory. Groups are neighbours along the last axis."""
Rounding = Callable[[str, Tensor, Bits], Packed]
"""Packs a layer's matrix as it will lie in memory, given the layer's path."""


def to_nearest(_path: str, matrix: Tensor, bits: Bits) -> Packed:
    """Every weight takes its nearest level."""
    return pack(matrix, bits)


class PackedLinear(nn.Linear):
    """A frozen linear layer, `inputs` to `outputs`, whose matrix is packed.

    It is kept in the `order` "out in" or "in out". The parameter `weight` holds the codes. Nothing of the unpacked
    matrix stays for the backward pass, which unpacks it again.
    """

    scales: nn.Parameter
    top: nn.Parameter

    def __init__(
        self, inputs: int, outputs: int, bits: Bits, order: Order, bias: nn.Parameter | None, device: torch.device | str
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.order = inputs, outputs, order
        self.shape = torch.Size((outputs, inputs) if order == "out in" else (inputs, outputs))
        for part, (shape, dtype) in packed_shapes(self.shape, bits).items():
            empty = torch.zeros(shape, dtype=dtype, device=device)
            setattr(self, PARTS[part], nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def bits(self) -> int:
        """Bits of a weight, its share of the scale left out."""
        return self.weight.shape[-1] // 8

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, unpacked: (in, out)."""
        found = unpack(self.weight, self.scales, self.top, self.shape, dtype)
        return found.mT if self.order == "out in" else found

    def fill(self, packed: Packed) -> None:
        """Take in a packed matrix of `shape`."""
        for part, name in PARTS.items():
            self.get_parameter(name).data.copy_(getattr(packed, part))

    def forward(self, input: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        found = cast(Tensor, cast(Any, _Product).apply(input, self))
        return found if cast(Any, self.bias) is None else found + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x times a packed matrix, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None]:
        (error,) = errors
        return error @ ctx.layer.dense(error.dtype).mT, None


def matrices_of(model: nn.Module, layout: Layout) -> list[str]:
    """Paths of all linear layers inside the blocks."""
    table = layout.table()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and table[f"{path}.weight"].place.stack is not None
    ]


def make_packed(model: PreTrainedModel, paths: Sequence[str], bits: Bits, order: Order) -> None:
    """Put packed layers in the place of linear ones, on the same device, their matrices not filled.

    The model's configuration says so from then on.
    """
    model.config.quantization_config = cast(Any, PackedConfig)(bits=bits, order=order).to_dict()
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | Conv1D)
        inputs, outputs = reversed(layer.weight.shape) if isinstance(layer, nn.Linear) else layer.weight.shape
        bias = cast("nn.Parameter | None", layer.bias)
        model.set_submodule(path, PackedLinear(inputs, outputs, bits, order, bias, layer.weight.device))


def packed_weights(
    weights: Iterable[tuple[str, Tensor]],
    paths: Sequence[str],
    bits: Bits,
    turned: bool,
    rounding: Rounding = to_nearest,
) -> Iterator[tuple[str, Tensor]]:
    """Named weights, those of the layers at `paths` packed by a `rounding`: each part by its parameter's name.

    `turned` says that the packed layers keep (out, in) where these weights are (in, out), or the other way round.
    """
    packed = {f"{path}.weight": path for path in paths}
    for name, values in weights:
        if name not in packed:
            yield name, values
            continue
        path = packed[name]
        found = rounding(path, values.mT.contiguous() if turned else values, bits)
        del values
        for part, leaf in PARTS.items():
            yield f"{path}.{leaf}", getattr(found, part)


def load_bridge(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", streamed: bool = False
) -> PreTrainedModel:
    """A Bridge, packed or not, in evaluation mode; what is not packed is in `dtype`. Raises ModelError.

    A `streamed` one has one block's matrices in memory, and reads another ahead.
    """
    if not streamed:
        return load_model(str(folder), dtype=dtype, device=device, packed=True)
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint is not None
    return load_streamed(str(folder), checkpoint, dtype=dtype, device=device, packed=True)[0]


def bytes_of(bridge: PreTrainedModel, layout: Layout, reads_tokens: bool) -> int:
    """Bytes of a Bridge's parameters, without embeddings and head where it does not read tokens.

    What is not packed counts with 16 bits, as the large model's weights do.
    """
    left_out = set() if reads_tokens else layout.vocabulary()
    counted = [p for name, p in bridge.named_parameters() if name not in left_out]
    return sum(p.nbytes if p.dtype == torch.int8 else 2 * p.numel() for p in counted)


@register_quantization_config(PACKED)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model: bits of a weight, how many share a scale, and matrices' order."""

    def __init__(self, bits: int = 4, group_size: int = GROUP, order: Order = "out in", **_: Any) -> None:
        self.quant_method = cast(Any, PACKED)
        self.bits, self.group_size, self.order = bits, group_size, order


@register_quantizer(PACKED)
class PackedQuantizer(HfQuantizer):
    """Loads a packed model: its linear layers are packed ones before their parameters are read."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        layout = layout_of_config(model.config.to_dict())
        said: Any = self.quantization_config
        make_packed(model, matrices_of(model, layout), said.bits, said.order)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        kind = param.get_dtype() if hasattr(param, "get_dtype") else None
        return None if kind in ("I8",) else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Their own weights cannot be trained."""
        return False
