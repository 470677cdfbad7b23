"""Progress as an argument: library code advances a bar, only the command line draws one."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

WINDOW = 20
"""Steps whose mean loss is shown, and compared with that of as many before."""
CHANGE = 0.01
"""Share of a loss below which it counts as level."""


class Advance(Protocol):
    """Says that so many more are done, and what is worth showing beside the bar, such as the loss."""

    def __call__(self, count: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Something that can show how far a named piece of work has come."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]: ...


def ignore(count: int, note: str = "") -> None:
    """Show nothing of it."""
    del count, note


class Silent:
    """Progress that shows nothing."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        yield ignore


def trend(losses: Sequence[float]) -> str:
    """The mean of the last losses and where it is going: down, up, or level beside that of as many before."""
    count = max(1, min(WINDOW, len(losses) // 2))
    now, before = losses[-count:], losses[-2 * count : -count]
    value = sum(now) / len(now)
    if not before:
        return f"loss {value:.3g}"
    change = value - sum(before) / len(before)
    level = abs(change) <= CHANGE * abs(value)
    return f"loss {value:.3g} {'→' if level else '↓' if change < 0 else '↑'}"
