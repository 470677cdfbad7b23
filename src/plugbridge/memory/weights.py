"""Random weights of a model's shape on disk, written one tensor at a time: no model of the size is ever in memory."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from plugbridge.errors import RunError
from plugbridge.files import folder_atomically
from plugbridge.memory.case import Case
from plugbridge.tensors.writer import write_tensors

RANDOM = "random-weights"
"""A file that marks a directory as one of ours."""


def write_weights(case: Case, folder: Path) -> Path:
    """A model directory of the case's shape and dtype; one that is there already stays. Raises RunError.

    Returns the directory.
    """
    if folder.is_dir():
        if not (folder / RANDOM).is_file():
            raise RunError(
                f"{folder} was not made by plugbridge, which keeps random weights there; choose another --out"
            )
        return folder
    model, _ = case.on_meta()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    need = sum(parameter.nbytes for parameter in parameters.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise RunError(f"{folder} needs {need / 1e9:.1f} GB for random weights, {free / 1e9:.1f} GB are free")
    with folder_atomically(folder) as temporary:
        (temporary / RANDOM).touch()  # first: what is half-written can be told from others' folders, too
        case.config.save_pretrained(str(temporary))
        generator = torch.Generator().manual_seed(0)
        shapes = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in parameters.items()}
        values = ((name, _values(name, parameter, generator)) for name, parameter in parameters.items())
        write_tensors(temporary / "model.safetensors", shapes, values)
    return folder


def keep_only(folder: Path, name: str | None) -> None:
    """Remove every model of random weights in a directory but the one of this name, half-written ones too."""
    for other in folder.iterdir() if folder.is_dir() else ():
        if (other / RANDOM).is_file() and other.name != name:
            shutil.rmtree(other)


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Small random matrices, norms of ones, biases of zeros."""
    if like.dim() < 2:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(like.shape, dtype=like.dtype)
    values = torch.empty(like.numel(), dtype=like.dtype)
    for part in values.split(2**22):  # the generator makes float32 first
        part.normal_(std=0.02, generator=generator)
    return values.reshape(like.shape)
