"""A second process that predictions are made on. Nothing heavy is imported here: it starts while this one imports."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Generator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def second_process() -> Generator[Executor | None]:
    """A process that gets ready at once; None where there is no second core for it."""
    if _cores() < 2:
        yield None
        return
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        pool.submit(_get_ready)
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _get_ready() -> None:
    """Import what predictions need; what is logged, the first process logs as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    from plugbridge.memory.predict import predict  # pyright: ignore[reportUnusedImport]  # noqa: F401
    from plugbridge.models import quiet_transformers

    quiet_transformers()
