"""Safetensors files read one tensor at a time, each file checked to be whole and to stay as it was.

Tensors are read into memory of their own instead of being mapped: a mapped file that
shrinks kills the process, and pages that are only mapped are not read ahead.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from plugbridge.errors import ModelError
from plugbridge.parsing import shown
from plugbridge.tensors.headers import AGAIN, Entry, Headers, Stamp, read_headers, stamp_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
CHANGED = "has changed while the run was going on; leave the model's files alone and run again"


@dataclass(frozen=True)
class Checkpoint(Headers):
    """The tensors of one model's safetensors files by name. Opening reads headers only; `read` may be called from
    several threads."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, in a dtype or as it is stored, in memory of its own.

        Raises ModelError that names tensor and file: if the file has changed since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        self._require_known(name, entry)
        tensor, memory = _allocate(entry.shape, DTYPES[entry.dtype])
        try:
            with entry.shard.open("rb") as file:
                self._check(entry.shard, stamp_of(entry.shard), name)
                file.seek(entry.start)
                got = _fill(file, memory, entry.nbytes)
            self._check(entry.shard, stamp_of(entry.shard), name)
        except OSError as error:
            raise ModelError(f"cannot read tensor {shown(name)} of {entry.shard}: {error.strerror}; {AGAIN}") from error
        if got != entry.nbytes:
            raise ModelError(f"{entry.shard} ends inside tensor {shown(name)}; {AGAIN}")
        return tensor if dtype in (None, tensor.dtype) else _allocate(entry.shape, dtype)[0].copy_(tensor)

    def require_readable(self) -> None:
        """Raises ModelError that names a tensor which `read` cannot read, before any is read."""
        for name, entry in self.entries.items():
            self._require_known(name, entry)

    def require_unchanged(self) -> None:
        """Raises ModelError that names a file which has changed since it was opened, or is gone."""
        for shard, stamp in self.stamps.items():
            try:
                changed = stamp_of(shard) != stamp
            except OSError:
                changed = True
            if changed:
                raise ModelError(f"{shard} {CHANGED}")

    def _require_known(self, name: str, entry: Entry) -> None:
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"tensor {shown(name)} in {entry.shard} is of type {shown(entry.dtype)}, which cannot be streamed; use "
                "resident: all"
            )

    def _check(self, shard: Path, now: Stamp, name: str) -> None:
        if now != self.stamps[shard]:
            raise ModelError(f"{shard} {CHANGED} (found when reading tensor {shown(name)})")


def open_checkpoint(shards: Iterable[Path]) -> Checkpoint:
    """Read and check the headers of all files of a model. Raises ModelError that names file and tensor."""
    found = read_headers(shards)
    return Checkpoint(found.entries, found.stamps)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, mmap]:
    """An empty tensor and its bytes, which go back to the system as soon as it is dropped.

    malloc keeps what it is given back when a little of something else lies behind it: pruning with tensors from there
    took 0.75 of the model.
    """
    count = math.prod(shape)
    memory = mmap(-1, max(1, count) * dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=max(1, count))[:count].reshape(shape), memory


def _fill(file: BinaryIO, memory: mmap, count: int) -> int:
    """Read so many bytes. Returns how many there were."""
    with memoryview(memory) as view:
        total = 0
        while total < count and (got := cast(Any, file).readinto(view[total:count])):
            total += got
    return total
