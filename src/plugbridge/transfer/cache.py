"""Activations of rows, kept in memory or in a file, so that the large model reads each row once."""

import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plugbridge.errors import RunError
from plugbridge.tasks.encode import Encoded

CacheKind = Literal["off", "memory", "disk"]


class ActivationCache(Protocol):
    """Tensors (length, width) by name for every row added; `bytes` is what they take."""

    bytes: int

    def __contains__(self, row: object) -> bool: ...
    def add(self, row: Encoded, tensors: Mapping[str, Tensor]) -> None:
        """Keep one row's tensors."""
        ...

    def get(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Rows' tensors by name, padded with zeros on the right: (n, length, width)."""
        ...


def make_cache(kind: CacheKind, folder: Path | None) -> ActivationCache | None:
    """A cache of the kind asked for; `folder` is where a file may stand."""
    if kind == "off":
        return None
    if kind == "memory":
        return MemoryCache()
    assert folder is not None
    return DiskCache(folder / "activations.bin")


def _pad(parts: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: pad_sequence(tensors, batch_first=True) for name, tensors in parts.items()}


class MemoryCache:
    """Rows' tensors on the CPU."""

    def __init__(self) -> None:
        self.rows: dict[Encoded, dict[str, Tensor]] = {}
        self.bytes = 0

    def __contains__(self, row: object) -> bool:
        return row in self.rows

    def add(self, row: Encoded, tensors: Mapping[str, Tensor]) -> None:
        """Keep one row's tensors."""
        kept = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        self.rows[row] = kept
        self.bytes += sum(tensor.nbytes for tensor in kept.values())

    def get(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Rows' tensors by name, padded with zeros on the right: (n, length, width)."""
        return _pad({name: [self.rows[row][name] for row in rows] for name in self.rows[rows[0]]})


class DiskCache:
    """Rows' tensors one after another in a file that this object owns; where each begins is in memory.

    The file is made anew and unlinked at once where the system allows it, so it never outlives the run.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = path.open("w+b")
        weakref.finalize(self, self.file.close)
        self.folder = path.parent
        path.unlink()
        self.places: dict[Encoded, list[tuple[str, int, tuple[int, ...], torch.dtype]]] = {}
        self.bytes = 0

    def __contains__(self, row: object) -> bool:
        return row in self.places

    def add(self, row: Encoded, tensors: Mapping[str, Tensor]) -> None:
        """Keep one row's tensors. Raises RunError."""
        need = sum(tensor.nbytes for tensor in tensors.values())
        if shutil.disk_usage(self.folder).free < need:
            raise RunError(
                f"no room for the cache of activations in {self.folder}: {self.bytes / 1e6:.0f} MB written for "
                f"{len(self.places)} rows; use couple.cache: off, or another --out"
            )
        places: list[tuple[str, int, tuple[int, ...], torch.dtype]] = []
        self.file.seek(self.bytes)
        for name, tensor in tensors.items():
            data = tensor.detach().cpu().contiguous()
            places.append((name, self.bytes, tuple(data.shape), data.dtype))
            self.file.write(data.view(torch.uint8).numpy().tobytes())
            self.bytes += data.nbytes
        self.places[row] = places

    def get(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Rows' tensors by name, padded with zeros on the right: (n, length, width)."""
        parts: dict[str, list[Tensor]] = {}
        for row in rows:
            for name, start, shape, dtype in self.places[row]:
                self.file.seek(start)
                count = torch.Size(shape).numel() * dtype.itemsize
                data = torch.frombuffer(bytearray(self.file.read(count)), dtype=dtype)
                parts.setdefault(name, []).append(data.reshape(shape))
        return _pad(parts)
