"""Random weights of a model's shape on disk, written one tensor at a time: no model of the size is ever in memory."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from plugbridge.errors import RunError
from plugbridge.files import folder_atomically
from plugbridge.memory.case import Case

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Dtypes as safetensors calls them."""


def write_weights(case: Case, folder: Path) -> Path:
    """A model directory of the case's shape and dtype; one that is there already stays. Raises RunError.

    Returns the directory.
    """
    if folder.is_dir():
        return folder
    model, _ = case.on_meta()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    need = sum(parameter.nbytes for parameter in parameters.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise RunError(f"{folder} needs {need / 1e9:.1f} GB for random weights, {free / 1e9:.1f} GB are free")
    with folder_atomically(folder) as temporary:
        case.config.save_pretrained(str(temporary))
        with (temporary / "model.safetensors").open("wb") as file:
            file.write(_header(parameters))
            generator = torch.Generator().manual_seed(0)
            for name, parameter in parameters.items():
                file.write(_values(name, parameter, generator).view(torch.uint8).numpy().data)
    return folder


def _header(parameters: dict[str, nn.Parameter]) -> bytes:
    """Where each tensor will be, as safetensors writes it: the text's length, and the text."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, parameter in parameters.items():
        offsets = [at, at + parameter.nbytes]
        entries[name] = {"dtype": NAMES[parameter.dtype], "shape": list(parameter.shape), "data_offsets": offsets}
        at += parameter.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Small random matrices, norms of ones, biases of zeros; flat."""
    if like.dim() < 2:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(like.numel(), dtype=like.dtype)
    values = torch.empty(like.numel(), dtype=like.dtype)
    for part in values.split(2**22):  # the generator makes float32 first
        part.normal_(std=0.02, generator=generator)
    return values
