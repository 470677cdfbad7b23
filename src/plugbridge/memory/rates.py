"""This machine: how fast it is at what steps consist of, and what its matrix library keeps."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plugbridge.cost import settle
from plugbridge.memory.alive import HALVES
from plugbridge.memory.case import Case
from plugbridge.memory.predict import Trace

SIZES = {"cpu": (1024, 2**25), "cuda": (8192, 2**28)}
"""Rows of the matrices and entries of the vectors: a card needs large ones to show what it can do,
and a processor vectors that its caches do not hold."""

PRIMITIVES, WIDTH = 24, 256
"""How many primitives are compiled to see what stays of one, and for matrices how wide."""


@dataclass(frozen=True)
class Rates:
    """Multiplications and additions a second in matrix products, and bytes a second in everything else."""

    flops: float
    moved: float


def seconds_of(counts: Trace, rates: Mapping[torch.dtype, Rates]) -> float:
    """What one repetition of a step takes, each precision at its own rates. Reading from disk is not in it."""
    products = sum(count / rates[number].flops for number, count in counts.flops.items())
    return products + sum(count / rates[number].moved for number, count in counts.moved.items())


def rates_for(cases: Iterable[Case], device: str, threads: int) -> dict[torch.dtype, Rates]:
    """This machine's rates in every precision that steps of these cases compute in; Bridges and modules are float32."""
    numbers = {torch.float32, *(case.dtype for case in cases)}
    return {number: measure_rates(number, device, threads) for number in sorted(numbers, key=str)}


def measure_rates(dtype: torch.dtype, device: str, threads: int) -> Rates:
    """A product of square matrices and a sum of two long vectors, the fastest of a few tries each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size, length = SIZES["cuda" if device.startswith("cuda") else "cpu"]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x, y = (torch.ones(length, device=device, dtype=dtype) for _ in range(2))
    found = Rates(
        2 * size**3 / _fastest(lambda: a @ b, device), 3 * length * x.itemsize / _fastest(lambda: x + y, device)
    )
    torch.set_num_threads(before)
    return found


def primitive_bytes(device: str, dtypes: Iterable[torch.dtype]) -> int:
    """Bytes that stay of the primitive that the matrix library compiles for every shape of a half-precision product.

    oneDNN does so on processors, for bfloat16; something stays even of those that its cache lets go. 0 where none of
    the dtypes is of half precision, and on a card.
    """
    half = next((dtype for dtype in dtypes if dtype in HALVES), None)
    if half is None or device.startswith("cuda"):
        return 0
    before = settle()
    for place in range(PRIMITIVES):
        torch.matmul(torch.ones(WIDTH + place, WIDTH, dtype=half), torch.ones(WIDTH, WIDTH, dtype=half))
    return max(0, settle() - before) // PRIMITIVES


def _fastest(work: Callable[[], Tensor], device: str) -> float:
    seconds: list[float] = []
    for _ in range(4):
        begun = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
