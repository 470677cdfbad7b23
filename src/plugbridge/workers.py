"""Processes that work for this one. Nothing heavy is imported here: they are quiet before they import it."""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

from plugbridge.errors import RunError
from plugbridge.interrupts import block_handled, blocked, unblock

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 120
"""Seconds in which a process that is told to end must have ended, its checkpoint written."""

NOISY = {
    **dict.fromkeys(("httpx", "httpx2", "urllib3", "matplotlib", "filelock"), logging.WARNING),
    "bitsandbytes": logging.ERROR,  # it misses an optional package wherever it is imported
}
"""Libraries' loggers that tell users nothing, with the level from which they do."""


def quiet_loggers() -> None:
    """Keep what other libraries log out of our output."""
    for name, level in NOISY.items():
        logging.getLogger(name).setLevel(level)


class Workers(ProcessPoolExecutor):
    """Processes that are interrupted at their work only, with nothing to say of it, and end with this one."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        with blocked():  # a process begins here, and has its signals blocked until it works
            return super().submit(_interruptible, fn, *args, **kwargs)

    def end(self) -> None:
        """Tell the processes to end; those that do not, or are not waited for, are killed."""
        self.shutdown(wait=False, cancel_futures=True)
        children = multiprocessing.active_children()
        try:
            for child in children:
                child.terminate()
            for child in children:
                child.join(PATIENCE)
        finally:
            for child in children:
                child.kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if isinstance(error, KeyboardInterrupt):
            self.end()
        return super().__exit__(kind, error, trace)


def workers(count: int, start: Literal["spawn", "fork"] = "spawn", ready: Callable[[], Any] | None = None) -> Workers:
    """So many new processes, which end when this one does, however it ends.

    They begin anew, or as a copy of this process, which must not have begun to compute. `ready` is called in each
    before it imports any work.
    """
    return Workers(count, multiprocessing.get_context(start), _begin, (ready,))


def _interruptible(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        unblock()
        return fn(*args, **kwargs)
    finally:
        block_handled()


def apart(work: Callable[[], T], what: str = "the stage") -> T:
    """What some work gives, done by a copy of this process, which must not have begun to compute.

    Raises what it raises; RunError, which says `what` it was, if the copy was killed.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    copy = context.Process(target=_answer, args=(work, there))
    with blocked():
        copy.start()
    there.close()
    try:
        found, error, trace = here.recv()
    except EOFError:
        copy.join()
        raise RunError(_ended(what, copy.exitcode or 0)) from None
    except BaseException:  # an interrupt that the copy need not have seen
        copy.terminate()
        try:
            copy.join(PATIENCE)
        finally:  # whatever interrupts that, too
            copy.kill()  # one that is gone is left alone
        raise
    finally:
        copy.join()
        here.close()
    if error is not None:
        raise error from _Elsewhere(trace)
    return found


class _Elsewhere(Exception):
    """The traceback of an error in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


Answer = tuple[Any, BaseException | None, str]


def _answer(work: Callable[[], Any], there: "connection.Connection[Any, Any]") -> None:
    _begin()
    try:
        answer = _outcome(work)
    except KeyboardInterrupt as error:  # one more, while the first was noted
        answer = (None, error, "")
    there.send(answer)


def _outcome(work: Callable[[], Any]) -> Answer:
    try:
        return _interruptible(work), None, ""
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # such as one whose arguments are not those of its class
            return None, RuntimeError(f"{type(error).__name__}: {error}"), trace
        return None, error, trace


def _ended(what: str, code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            f"{what} was killed, by the system if memory ran out; `plugbridge plan` says what it needs, and the same "
            "command goes on from its last checkpoint"
        )
    if code == -signal.SIGBUS:
        return f"{what} was ended by SIGBUS: a file that it reads was cut short meanwhile; put it back and run again"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return f"{what} ended {how}; run the same command again to resume"


def _begin(ready: Callable[[], Any] | None = None) -> None:
    quiet_loggers()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # rather than work on unseen

    threading.Thread(target=watch, daemon=True).start()
    block_handled()
    if ready is not None:
        ready()
