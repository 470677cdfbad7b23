"""Predictions of steps, each made once."""

from collections.abc import Hashable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from threading import Lock

from plugbridge.memory.predict import Trace, predict
from plugbridge.memory.rows import Row
from plugbridge.progress import Progress, Silent


class Predictions:
    """Predictions by step and case: equal ones are made once.

    Those that are expected are made by `beside`, where there is one, and by this process while it waits. Peaks hold
    `primitive_bytes` for every primitive that the matrix library compiles.
    """

    def __init__(self, beside: Executor | None = None, primitive_bytes: int = 0) -> None:
        self._beside, self._primitive_bytes = beside, primitive_bytes
        self._known: dict[Hashable, Trace] = {}
        self._waiting: dict[Hashable, Row] = {}
        self._begun: dict[Hashable, Future[Trace]] = {}
        self._lock = Lock()

    def expect(self, rows: Sequence[Row]) -> None:
        """These will be asked for."""
        with self._lock:
            for row in rows:
                key = _key(row)
                if key not in self._known and key not in self._begun:
                    self._waiting[key] = row
            free = all(future.done() for future in self._begun.values())
        if free:
            self._hand_over()

    def of(self, row: Row) -> Trace:
        """A row's prediction."""
        key = _key(row)
        if key not in self._known:
            self._make(key, row)
        return self._known[key].keeping(self._primitive_bytes)

    def all(self, rows: Sequence[Row], progress: Progress | None = None) -> list[Trace]:
        """The predictions of rows."""
        self.expect(rows)
        found: list[Trace] = []
        with (progress or Silent()).bar("predict every step", len(rows)) as advance:
            for row in rows:
                advance(0, row.method)
                found.append(self.of(row))
                advance(1)
        return found

    def _make(self, key: Hashable, row: Row) -> None:
        with self._lock:
            self._waiting.pop(key, None)
            begun = self._begun.get(key)
        if begun is None:
            self._known[key] = predict(row.case, row.make)
            return
        while not begun.done() and (other := self._next()) is not None:
            self._known[other[0]] = predict(other[1].case, other[1].make)
        try:
            self._known[key] = begun.result()
        except BrokenExecutor:  # the other process was killed
            self._known[key] = predict(row.case, row.make)

    def _next(self) -> tuple[Hashable, Row] | None:
        with self._lock:
            key = next(iter(self._waiting), None)
            return None if key is None else (key, self._waiting.pop(key))

    def _hand_over(self, _done: Future[Trace] | None = None) -> None:
        """Give the next one to the other process; it comes back for another when it is done."""
        with self._lock:
            if self._beside is None or not self._waiting:
                return
            key, row = next(iter(self._waiting.items()))
            try:
                future = self._beside.submit(predict, row.case, row.make)
            except RuntimeError:  # it was shut down: nobody waits any more
                return
            self._begun[key] = future
            del self._waiting[key]
        future.add_done_callback(self._hand_over)


def _key(row: Row) -> Hashable:
    return id(row.make), repr(row.case)
