"""What libraries bring into memory at their first use, brought before a stage's memory is counted."""

import mmap
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from plugbridge.memory.case import Case
from plugbridge.memory.shapes import find_shapes
from plugbridge.memory.steps import STEPS
from plugbridge.memory.weights import write_weights

SIDE = 512
"""Large enough for the matrix library's kernels for large matrices, those that find eigenvectors, too."""
TALL, WIDE = (8192, 512, 512), (512, 384, 6400)
"""Products, (n, m) by (m, k), for which MKL makes the largest buffers: 5 MiB a thread in float32 for the wide one and
11 in float64 for the tall one; on a processor with AMX none in float32, and 5 and 19 more in float64 for both.

With rows for every thread. After them no other needs more: square, thin, wide and tall ones were tried with torch
2.13's MKL, up to 32768 rows, 50257 columns and 4096 x 4096.
"""
THREADS = 4
"""Threads that are given rows at most: with more the matrices themselves would be large."""


def warm_up(dtype: torch.dtype = torch.float32) -> None:
    """Do the steps of a run on a tiny model, in memory and from disk, and multiply matrices of some size.

    In a copy of a process the pages of files are not there until they are read again: some 50 MiB of code, and 6 more
    for bfloat16. Bridge and modules are float32 whatever the models' `dtype`.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        np.random.default_rng(0).permutation(SIDE).mean()
        for number in dict.fromkeys((torch.double, torch.float32, dtype)):
            multiply(number)
        for number in dict.fromkeys((torch.float32, dtype)):
            _do_steps(number, Path(folder) / str(number))
        square = torch.rand(SIDE, SIDE, dtype=torch.double)
        torch.linalg.eigh(square @ square.mT)


def multiply(dtype: torch.dtype) -> None:
    """Multiply matrices for which the matrix library makes the largest buffers that it keeps.

    The matrices are not in the heap: glibc would keep larger blocks there from then on.
    """
    for n, m, k in (TALL, WIDE) if dtype == torch.double else (WIDE,):
        rows = n * min(torch.get_num_threads(), THREADS)
        one, two, product = (_mapped(*shape, dtype) for shape in ((rows, m), (m, k), (rows, k)))
        torch.matmul(one, two, out=product)


def _mapped(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    space = mmap.mmap(-1, rows * columns * dtype.itemsize)
    return torch.frombuffer(space, dtype=dtype).view(rows, columns)


def _do_steps(dtype: torch.dtype, folder: Path) -> None:
    (shape,) = find_shapes("tiny")
    case = Case(shape.large, shape.batch, shape.length, dtype, reduction=2, channels="gradient_pca")
    streamed = replace(case, streamed=True, weights=str(write_weights(case, folder)))
    for name in ("tuned", "score", "prune", "couple, feedback", "evaluate"):
        step = STEPS[name](streamed if name in ("score", "prune") else case)
        step.begin()
        step.work()
