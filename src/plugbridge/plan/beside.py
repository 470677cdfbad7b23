"""A second process that predictions are made on. Nothing heavy is imported here: it starts while this one imports."""

import logging
import os
import signal
import sys
from collections.abc import Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, cast

from plugbridge.workers import workers


@contextmanager
def second_process() -> Generator[Executor | None]:
    """A process that gets ready at once; None where there is no second core for it."""
    if _cores() < 2:
        yield None
        return
    pool = workers(1)
    try:
        pool.submit(_get_ready)
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def import_less() -> None:
    """Let libraries that are not imported yet do without packages that predictions have no use for.

    peft imports bitsandbytes wherever it is installed, and that torch's compiler: a quarter of all imports' time.
    """
    if "transformers" not in sys.modules:  # a process that has it may use them for other things
        cast(dict[str, Any], sys.modules).setdefault("bitsandbytes", None)  # as if it was not installed


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _get_ready() -> None:
    """Import what predictions need; what is logged, the first process logs as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    import_less()
    from plugbridge.memory.predict import predict  # pyright: ignore[reportUnusedImport]  # noqa: F401
    from plugbridge.models import quiet_transformers

    quiet_transformers()
