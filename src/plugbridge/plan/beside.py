"""A second process that predictions are made on."""

import logging
import os
import signal
import sys
from collections.abc import Generator
from concurrent.futures import Executor
from contextlib import contextmanager

from plugbridge.imports import leave_out_bitsandbytes
from plugbridge.workers import workers


@contextmanager
def second_process(copied: bool = False) -> Generator[Executor | None]:
    """A process that gets ready at once; None where there is no second core for it.

    Under Linux it may be `copied` from this one with all that is imported, if this one has not begun to compute: two
    that import at the same time slow each other.
    """
    if _cores() < 2:
        yield None
        return
    pool = workers(1, "fork" if copied and sys.platform == "linux" else "spawn", leave_out_bitsandbytes)
    try:
        pool.submit(_get_ready)
        yield pool
    except KeyboardInterrupt:
        pool.end()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _get_ready() -> None:
    """Import what predictions need, where it is not; what is logged, the first process logs as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from plugbridge.memory.predict import predict  # pyright: ignore[reportUnusedImport]  # noqa: F401
    from plugbridge.models import quiet_transformers

    quiet_transformers()
    logging.disable(logging.WARNING)
