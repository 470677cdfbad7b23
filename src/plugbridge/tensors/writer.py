"""Writing a safetensors file one tensor at a time: no more than one of them is in memory."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from plugbridge.errors import ModelError
from plugbridge.parsing import shown

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int8: "I8"}
"""Dtypes as safetensors calls them."""
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def write_tensors(path: Path, shapes: Shapes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file of tensors that come one after another, in the order of their shapes.

    Raises ModelError for a tensor that is not the one whose turn it is, or where one is missing.
    """
    waiting = iter(shapes.items())
    with path.open("wb") as file:
        file.write(_header(shapes))
        for name, tensor in tensors:
            wanted = next(waiting, None)
            if wanted != (name, (tuple(tensor.shape), tensor.dtype)):
                raise ModelError(
                    f"{path}: {shown(name)} is {tensor.dtype} {tuple(tensor.shape)}; expected was {wanted}"
                )
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if (missing := next(waiting, None)) is not None:
        raise ModelError(f"{path}: {shown(missing[0])} was not written")


def _header(shapes: Shapes) -> bytes:
    """Where each tensor will be, as safetensors writes it: the text's length, and the text."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
