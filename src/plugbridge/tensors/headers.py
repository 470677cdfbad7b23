"""Headers of safetensors files: which tensors a model has and where they are; nothing of the tensors is read.

The format is 8 bytes with the header's length, a JSON header with every tensor's dtype, shape and byte range, and the
bytes. A header needs no torch, so that a broken file is refused before it is imported.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from plugbridge.errors import ModelError
from plugbridge.parsing import parse_json, read_text, shown

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of a number, by the type's name in the header."""
AGAIN = "download or copy the checkpoint again"
_HEADER = 100_000_000  # bytes of a header, by the format; an index has no more to say
_DIMENSIONS = 64  # of a tensor, as torch has it


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
class Headers:
    """The tensors of one model's safetensors files by name, and what its files were when their headers were read."""

    entries: Mapping[str, Entry]
    stamps: Mapping[Path, Stamp]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def read_headers(shards: Iterable[Path]) -> Headers:
    """Read and check the headers of all files of a model. Raises ModelError that names file and tensor."""
    entries: dict[str, Entry] = {}
    stamps: dict[Path, Stamp] = {}
    for shard in shards:
        try:
            stamps[shard] = stamp_of(shard)
            found = _read_header(shard, stamps[shard].size)
        except OSError as error:
            raise ModelError(f"cannot read {shard}: {error.strerror}; expected a safetensors file") from error
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise ModelError(f"tensor {shown(twice[0])} is in both {entries[twice[0]].shard} and {shard}; {AGAIN}")
        entries.update(found)
    return Headers(entries, stamps)


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


def stamp_of(path: Path) -> Stamp:
    """What tells this version of a file from another."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


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
        width = WIDTHS.get(entry.dtype)
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
