"""Tensors put away in a file and taken out again, each the same object throughout.

What is put away stays a tensor without elements, so that who knows a tensor by its identity need not know where its
values are.
"""

import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from plugbridge.cost import GIVEN_BACK, trim

TRIMMED = 2**20
"""Bytes of small states after which the heap is trimmed: it grows by some ten times as much."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's values are in the file, and what they are."""

    start: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Shelf:
    """A file of tensors that this object owns; a place is free again once its tensor is gone.

    The file is made anew and unlinked at once, so it never outlives the run. `bytes` is how long it is.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w+b")
        weakref.finalize(self, self.file.close)
        path.unlink()
        self.bytes = 0
        self._places: dict[int, Place] = {}
        self._free: dict[int, list[int]] = {}
        self._small = 0

    def put(self, tensor: Tensor) -> None:
        """Put a tensor's values away; those of one that was there before are in the file already."""
        if id(tensor) not in self._places:
            place = self._new_place(tensor)
            self._write(place, tensor)
            self._places[id(tensor)] = place
            weakref.finalize(tensor, self._gone, id(tensor)).atexit = False
        nbytes = tensor.nbytes if tensor.device.type == "cpu" else 0
        tensor.data = tensor.new_empty(0)
        self._trim(nbytes)

    def _trim(self, nbytes: int) -> None:
        """Small states leave holes among what stays, which others of their size then do not fit in."""
        if nbytes < GIVEN_BACK:
            self._small += nbytes
        if self._small >= TRIMMED:
            self._small = 0
            trim()

    def take(self, tensor: Tensor) -> None:
        """Bring a tensor's values back, if they are away."""
        place = self._places.get(id(tensor))
        if place is not None and tensor.shape != place.shape:
            tensor.data = self._read(place)

    def _new_place(self, tensor: Tensor) -> Place:
        free = self._free.get(tensor.nbytes)
        start = free.pop() if free else self.bytes
        self.bytes = max(self.bytes, start + tensor.nbytes)
        return Place(start, tensor.nbytes, tensor.shape, tensor.dtype, tensor.device)

    def _gone(self, key: int) -> None:
        place = self._places.pop(key)
        self._free.setdefault(place.nbytes, []).append(place.start)

    def _write(self, place: Place, tensor: Tensor) -> None:
        self.file.seek(place.start)
        self.file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _read(self, place: Place) -> Tensor:
        found = torch.empty(place.shape, dtype=place.dtype)
        self.file.seek(place.start)
        read = self.file.readinto(cast(Any, found.reshape(-1).view(torch.uint8).numpy()))
        if read != place.nbytes:
            raise OSError(f"the kept states end after {read} of {place.nbytes} bytes")
        return found.to(place.device)


@contextmanager
def taken_out(shelf: Shelf | None, *groups: object) -> Generator[list[Tensor]]:
    """Tensors of (nested) groups are at hand while this lasts, as are those that are added to the list it yields.

    Without a shelf they always are.
    """
    out = [tensor for group in groups for tensor in tensors_in(group)] if shelf is not None else []
    if shelf is not None:
        for tensor in out:
            shelf.take(tensor)
    try:
        yield out
    finally:
        if shelf is not None:
            for tensor in {id(tensor): tensor for tensor in out if tensor.numel()}.values():
                shelf.put(tensor)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(cast(dict[Any, Any], value).values())
    if isinstance(value, tuple | list):
        return [tensor for part in cast(Iterable[Any], value) for tensor in tensors_in(part)]
    return []
