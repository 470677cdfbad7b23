"""Safetensors files read one tensor at a time, each file checked to be whole and to stay as it was.

The format is 8 bytes with the header's length, a JSON header with every tensor's dtype, shape and byte
range, and the bytes. Tensors are read into memory of their own instead of being mapped: a mapped file that
shrinks kills the process, and pages that are only mapped are not read ahead.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from plugbridge.errors import ModelError
from plugbridge.parsing import parse_json, read_text, shown

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
AGAIN = "download or copy the checkpoint again"
_HEADER = 100_000_000  # bytes of a header, by the format; an index has no more to say
_DIMENSIONS = 64  # of a tensor, as torch has it
CHANGED = "has changed while the run was going on; leave the model's files alone and run again"


@dataclass(frozen=True)
class Stamp:
    """What tells one version of a file from another: its size in bytes, modification time in ns, and inode."""

    size: int
    modified: int
    inode: int


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: its file, dtype, shape and byte range in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model's safetensors files by name. Opening reads headers only; `read` may be called from
    several threads."""

    entries: Mapping[str, Entry]
    stamps: Mapping[Path, Stamp]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, in a dtype or as it is stored, in memory of its own.

        Raises ModelError that names tensor and file: if the file has changed since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        self._require_known(name, entry)
        tensor, memory = _allocate(entry.shape, DTYPES[entry.dtype])
        try:
            with entry.shard.open("rb") as file:
                self._check(entry.shard, _stamp(entry.shard), name)
                file.seek(entry.start)
                got = _fill(file, memory, entry.nbytes)
            self._check(entry.shard, _stamp(entry.shard), name)
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
                changed = _stamp(shard) != stamp
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
    entries: dict[str, Entry] = {}
    stamps: dict[Path, Stamp] = {}
    for shard in shards:
        try:
            stamps[shard] = _stamp(shard)
            found = _read_header(shard, stamps[shard].size)
        except OSError as error:
            raise ModelError(f"cannot read {shard}: {error.strerror}; expected a safetensors file") from error
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise ModelError(f"tensor {shown(twice[0])} is in both {entries[twice[0]].shard} and {shard}; {AGAIN}")
        entries.update(found)
    return Checkpoint(entries, stamps)


def read_index(path: Path) -> dict[str, str]:
    """Shard file name by tensor name, from a ``*.safetensors.index.json``. Raises ModelError."""
    where = f"{path} is no index of a sharded checkpoint"
    raw = parse_json(read_text(path, ModelError, most=_HEADER), where, ModelError)
    names: Any = cast(dict[str, Any], raw).get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{where}: it has no weight_map with a tensor; {AGAIN}")
    for name, shard in cast(dict[str, Any], names).items():
        if not isinstance(shard, str) or not shard or "\0" in shard or Path(shard).name != shard or len(shard) > 255:
            raise ModelError(f"{where}: {shown(name)} is in {shown(shard)}, which is no file's name; {AGAIN}")
    return cast(dict[str, str], names)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


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


def _read_header(shard: Path, size: int) -> dict[str, Entry]:
    with shard.open("rb") as file:
        first = int.from_bytes(file.read(8), "little")
        if first > _HEADER and size - 8 > _HEADER:
            raise ModelError(f"{shard} is corrupt: its header is said to have {first:,} bytes; {AGAIN}")
        if size < 8 or first > size - 8:
            raise ModelError(f"{shard} is truncated: it has {size} bytes and no whole header; {AGAIN}")
        text = file.read(first)
    raw = parse_json(text, f"{shard} is corrupt: its header is no safetensors header", ModelError)
    if not isinstance(raw, dict):
        raise ModelError(f"{shard} is corrupt: its header is no safetensors header; {AGAIN}")
    entries: dict[str, Entry] = {}
    for name, entry in cast(dict[str, Any], raw).items():
        if name != "__metadata__":
            place = _place(entry)
            if place is None:
                raise ModelError(
                    f"{shard} is corrupt: its header is no safetensors header, it has {shown(entry)} for tensor "
                    f"{shown(name)}; {AGAIN}"
                )
            dtype, shape, start, stop = place
            entries[name] = Entry(shard, dtype, shape, 8 + first + start, 8 + first + stop)
    _check_ranges(shard, entries, 8 + first, size)
    return entries


def _place(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """Dtype, shape and byte range that a header gives for a tensor; None for what says none."""
    if not isinstance(entry, dict):
        return None
    found = cast(dict[str, Any], entry)
    dtype, shape, span = found.get("dtype"), _counts(found.get("shape")), _counts(found.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2:
        return None
    return dtype, shape, span[0], span[1]


def _counts(value: Any) -> tuple[int, ...] | None:
    """Whole numbers that sizes and places can be; None for anything else."""
    if not isinstance(value, list) or len(numbers := cast(list[Any], value)) > _DIMENSIONS:
        return None
    return tuple(numbers) if all(type(number) is int and 0 <= number < 2**63 for number in numbers) else None


def _check_ranges(shard: Path, entries: Mapping[str, Entry], begin: int, size: int) -> None:
    """Refuse a file whose tensors do not fill it one after another."""
    at, last = begin, "its header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if entry.start != at or (width is not None and math.prod(entry.shape) * width != entry.nbytes):
            raise ModelError(
                f"{shard} is corrupt: the bytes of tensor {shown(name)} are not where they should be; {AGAIN}"
            )
        if entry.stop > size:
            raise ModelError(
                f"{shard} is truncated: tensor {shown(name)} ends at byte {entry.stop}, the file at {size}; {AGAIN}"
            )
        at, last = entry.stop, f"tensor {shown(name)}"
    if at != size:
        raise ModelError(f"{shard} is corrupt: it has {size - at} bytes after {last}; {AGAIN}")
