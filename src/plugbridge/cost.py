"""What a piece of work took: seconds and peak memory."""

import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass
class Cost:
    """Wall-clock seconds, and peak bytes over the resident memory the work started with.

    On CUDA, `peak_bytes` is the device's `max_memory_allocated`. On Linux the kernel's high-water
    mark is reset first, so stages do not hide behind each other; elsewhere the process's lifetime
    maximum is what there is, an upper bound.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


def free_memory(device: str) -> int:
    """Bytes that the device has free."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


@contextmanager
def measure(device: str) -> Generator[Cost]:
    """Measure a block of work on a device, all that it queued there included; the cost is filled in when it ends."""
    cost = Cost()
    cuda = device.startswith("cuda")
    before = psutil.Process().memory_info().rss
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_high_water()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        if cuda:
            cost.peak_bytes = int(torch.cuda.max_memory_allocated())
        else:
            cost.peak_bytes = max(0, _high_water() - before)


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
