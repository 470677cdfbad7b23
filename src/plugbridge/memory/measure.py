"""What a step really takes: run in a process of its own, so that steps do not hide behind each other."""

import gc
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from plugbridge.cost import GIVEN_BACK, measure, settle, trim
from plugbridge.imports import leave_out_bitsandbytes
from plugbridge.memory.case import Case
from plugbridge.memory.predict import at_depth, kinds_of
from plugbridge.memory.steps import MakeStep
from plugbridge.memory.warm import multiply
from plugbridge.memory.weights import write_weights
from plugbridge.models import quiet_transformers
from plugbridge.workers import workers

REPETITIONS = 3
"""Times that a step is done: the first one warms up, the fastest of the others counts."""
LONG = 60.0
"""Seconds after which a step is not done again."""


@dataclass(frozen=True)
class Measurement:
    """Peak bytes of a step, the model and all that it holds included, and seconds of one repetition."""

    peak_bytes: int
    seconds: float


def measured(case: Case, make: MakeStep, threads: int) -> Measurement:
    """Run a step in a new process; what Python and its libraries take before the model is made does not count."""
    with _inherited({"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": str(GIVEN_BACK)}):
        with workers(1, ready=leave_out_bitsandbytes) as pool:
            return pool.submit(run_here, case, make, threads).result()


def lasting(seconds: float) -> float:
    """Seconds that all repetitions of a step take, from those of one."""
    return seconds * (1 if seconds > LONG else 2 if 2 * seconds > LONG else REPETITIONS)


@contextmanager
def _inherited(variables: dict[str, str]) -> Generator[None]:
    """Environment variables that processes started in the block inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_here(case: Case, make: MakeStep, threads: int) -> Measurement:
    """Run a step in this process."""
    quiet_transformers()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _warm_up(case, make)
    before = settle()
    step = make(case)
    step.begin()
    gc.collect()
    if step.trained:
        trim()  # as before a training's first step
    held = psutil.Process().memory_info().rss - before
    seconds: list[float] = []
    with measure(case.device) as cost:
        while len(seconds) < (REPETITIONS if step.trained else 2) and sum(seconds) <= LONG:
            begun = time.perf_counter()
            step.work()
            _wait(case.device)
            seconds.append(time.perf_counter() - begun)
    peak = cost.peak_bytes if case.device.startswith("cuda") else cost.peak_bytes + held
    return Measurement(peak, min(seconds[1:] or seconds))


def _warm_up(case: Case, make: MakeStep) -> None:
    """Do the step on two layers and a few tokens, so that libraries have what they load and keep from first use."""
    few = at_depth(case, {kind: min(count, 1) for kind, count in kinds_of(case).items()})
    few = replace(few.shorter(1, 8), weights=None)
    with TemporaryDirectory() as folder:
        if few.reads_files:  # what quantises, not its stand-in; what reads files
            few = replace(few, weights=str(write_weights(few, Path(folder) / "model")))
        make(few).work()
    for number in dict.fromkeys((torch.double, torch.float32, case.dtype)):
        multiply(number)
    gc.collect()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
