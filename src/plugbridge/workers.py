"""Processes that work for this one. Nothing heavy is imported here: they are quiet before they import it."""

import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from typing import Literal

NOISY = {
    **dict.fromkeys(("httpx", "httpx2", "urllib3", "matplotlib", "filelock"), logging.WARNING),
    "bitsandbytes": logging.ERROR,  # it misses an optional package wherever it is imported
}
"""Libraries' loggers that tell users nothing, with the level from which they do."""


def quiet_loggers() -> None:
    """Keep what other libraries log out of our output."""
    for name, level in NOISY.items():
        logging.getLogger(name).setLevel(level)


def workers(count: int, start: Literal["spawn", "fork"] = "spawn") -> ProcessPoolExecutor:
    """So many new processes, which end when this one does, however it ends.

    They begin anew, or as a copy of this process, which must not have begun to compute.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context(start), _begin)


def _begin() -> None:
    quiet_loggers()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # rather than work on unseen

    threading.Thread(target=watch, daemon=True).start()
