"""What a piece of work took: seconds and peak memory."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import psutil
import torch


class Spent(TypedDict):
    """What an attempt at some work took, as a checkpoint keeps it."""

    seconds: float
    peak_bytes: int
    reserved_bytes: int


@dataclass
class Cost:
    """Wall-clock seconds, and the most memory over `baseline`.

    On CUDA that is the device's `max_memory_allocated`, and `reserved_bytes` its `max_memory_reserved`. Elsewhere it is
    resident memory. On Linux the kernel's high-water mark is reset first, so stages do not hide behind each other;
    where it cannot be, the process's lifetime maximum is what there is, an upper bound.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    baseline: int = 0
    cuda: bool = False
    since: float = field(default_factory=time.perf_counter)

    def note(self) -> None:
        """Take in the seconds since the last time, and the peak since the last reset."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        if self.cuda:
            self.reserved_bytes = max(self.reserved_bytes, int(torch.cuda.max_memory_reserved()))
        highest = int(torch.cuda.max_memory_allocated()) if self.cuda else _high_water() - self.baseline
        self.peak_bytes = max(self.peak_bytes, highest)

    def so_far(self) -> Spent:
        """What it took until now, for a later attempt at the same work."""
        self.note()
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "reserved_bytes": self.reserved_bytes}

    def go_on(self, earlier: Spent) -> None:
        """Take in what an earlier attempt took: its seconds count, and the larger peak."""
        self.seconds += earlier["seconds"]
        self.peak_bytes = max(self.peak_bytes, earlier["peak_bytes"])
        self.reserved_bytes = max(self.reserved_bytes, earlier["reserved_bytes"])


def settle() -> int:
    """Give back to the system what nobody uses any more; returns the resident bytes that stay."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # or the next stage's reserved bytes hold this one's
    trim()
    return int(psutil.Process().memory_info().rss)


def trim() -> None:
    """Give back to the system the pages that are free between those in use (glibc only); takes some milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


GIVEN_BACK = 2**17
"""Blocks of more bytes go back to the system when they are freed.

It is where glibc begins, too; but left alone it raises the limit to 32 MiB with the first block of that size that is
freed, and from then on what is counted is how its heap is cut up: 1.5 times the bytes alive for many blocks of 256 KiB.
"""
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def return_blocks() -> None:
    """From now on, give large blocks of memory back to the system as soon as they are free (glibc only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, GIVEN_BACK)


def baseline_memory() -> int:
    """Resident bytes before any model is loaded; free blocks go back to the system before.

    What is alive now, torch's and transformers' own objects above all, is left out of later searches for garbage,
    until this is called again.
    """
    gc.unfreeze()
    resident = settle()
    gc.freeze()
    return resident


def free_memory(device: str) -> int:
    """Bytes that the device has free; in a container with a memory limit, those that it leaves."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    return min([int(psutil.virtual_memory().available), *left_by_groups(Path("/"))])


GROUPS = {
    "sys/fs/cgroup": ("memory.max", "memory.current", "inactive_file"),
    "sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Linux control groups, version 2 and 1, as a container sees its own: files of limit and use, cached files' key."""


def left_by_groups(root: Path) -> list[int]:
    """Bytes that each control group with a memory limit leaves; files it holds in cache can be given back."""
    found: list[int] = []
    for folder, (limit, used, cached) in GROUPS.items():
        with suppress(OSError, ValueError):  # not there, or "max"
            most, now = (int((root / folder / name).read_text()) for name in (limit, used))
            lines = (line.split() for line in (root / folder / "memory.stat").read_text().splitlines())
            back = sum(int(line[1]) for line in lines if line[0] == cached)
            found.append(max(0, most - now + back))
    return found


@contextmanager
def measure(device: str, baseline: int | None = None, within: Cost | None = None) -> Generator[Cost]:
    """Measure a block of work on a device, all that it queued there included; the cost is filled in when it ends.

    Memory is counted over `baseline`, by default what the process holds now. Given a baseline from before anything was
    loaded, what earlier work left behind counts. `within` is a measurement that goes on around this one.
    """
    cuda = device.startswith("cuda")
    resident = psutil.Process().memory_info().rss if baseline is None else baseline
    cost = Cost(baseline=0 if cuda else resident, cuda=cuda)
    if within is not None:
        within.note()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_high_water()
    cost.since = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        for measured in (cost, within):
            if measured is not None:
                measured.note()


def _reset_high_water() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _high_water() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
