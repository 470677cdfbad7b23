"""Ctrl-C and its like: an exception once, and not in the middle of what must be whole."""

import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end: Ctrl-C, a scheduler, a closed terminal."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def raise_stopped(number: int, _frame: FrameType | None) -> None:
    """A handler of signals that ends in an exception, as Python's own of SIGINT does."""
    raise Stopped(number)


class Interrupts:
    """A handler of signals: the first one raises Stopped, or waits for the end of a block that is `held`.

    Of those that follow, one of another kind is what a process that was stopped itself sends on; one of a kind that
    came before means that somebody will not wait, and raises at once.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._held = False
        self.whole = True
        """Whether no held block was broken off."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        again, first = number in self.seen, not self.seen
        self.seen.append(number)
        if again or (first and not self._held):
            raise Stopped(number)

    @contextmanager
    def held(self) -> Generator[None]:
        """A block that a first signal does not cut."""
        self._held, self.whole = True, False
        yield
        self._held, self.whole = False, True
        if self.seen:
            raise Stopped(self.seen[0])


@contextmanager
def listening() -> Generator[Interrupts]:
    """Handle signals in a block. Those that are ignored, as in a shell's background, stay ignored."""
    found = Interrupts()
    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, found) for number in wanted}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blocked() -> Generator[None]:
    """Keep signals away from this thread, and from processes and threads that begin in the block, until `unblock`."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def block_handled() -> None:
    """Keep signals away from this thread that would be exceptions; the others end the process without a word."""
    if sys.platform != "win32":
        quiet = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
        signal.pthread_sigmask(signal.SIG_BLOCK, set(ENDING) - set(quiet))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, quiet)


def unblock() -> None:
    """Let signals come, those that waited too."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
