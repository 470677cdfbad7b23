"""Folding plug and module into one checkpoint of the large model.

After folding nothing of plugbridge is left: a LoRA is a LoRA of the large model, a prefix its
prefix. The large model's own weights are not touched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plugbridge.families.spec import Layout
from plugbridge.transfer.plug import apply_plug
from plugbridge.tuners.module import Module, pack
from plugbridge.tuners.table import Method


def fold(
    method: Method,
    small: Layout,
    large: Layout,
    plug: Mapping[str, Tensor],
    module: Module,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Checkpoint tensors of the large model: plug applied to the duplicated module in float64."""
    wide = {key: matrix.double() for key, matrix in plug.items()}
    carried = apply_plug(method, small, large, wide, {s: t.double() for s, t in module.items()})
    return {key: tensor.to(dtype) for key, tensor in pack(method, large, carried).items()}
