"""Progress as an argument: library code advances a bar, only the command line draws one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Something that can show how far a named piece of work has come."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]: ...


class Silent:
    """Progress that shows nothing."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        yield lambda _count: None
