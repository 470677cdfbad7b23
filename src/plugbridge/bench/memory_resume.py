"""Counting memory in several calls: every count is written at once, and a later call goes on from what is there."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plugbridge.bench.memory import Count, count_shape, rows_of, write_counts
from plugbridge.memory.rows import Row
from plugbridge.memory.shapes import Shape
from plugbridge.progress import Progress

CountRow = Callable[[Shape, Row], Count]


def count_resumably(
    shapes: Sequence[Shape],
    path: Path,
    room: int,
    device: str,
    threads: int,
    command: str,
    minutes: float,
    progress: Progress,
) -> tuple[list[Count], int]:
    """Count what `path` does not hold yet, beginning no row after so many minutes.

    Returns all counts in the rows' order, and how many are left. Counts of another command do not count.
    """

    def one(shape: Shape, row: Row) -> Count:
        (count,) = count_shape(shape, [row], room, device, threads, command, progress)
        return count

    wanted = [(shape, row) for shape in shapes for row in rows_of(shape, device)]
    return go_on(wanted, path, command, time.monotonic() + 60 * minutes, one)


def go_on(
    wanted: Sequence[tuple[Shape, Row]], path: Path, command: str, until: float, count: CountRow
) -> tuple[list[Count], int]:
    """The same for given rows; `until` is a time of `time.monotonic`. One row is counted in any case."""
    done = {_key(known): known for known in read_counts(path) if known.command == command}
    keys = [(shape.name, row.method, row.stage) for shape, row in wanted]
    todo = [(key, shape, row) for key, (shape, row) in zip(keys, wanted, strict=True) if key not in done]
    for number, (key, shape, row) in enumerate(todo):
        if number == 0 or time.monotonic() < until:
            done[key] = count(shape, row)
            write_counts([done[k] for k in keys if k in done], path)
    found = [done[key] for key in keys if key in done]
    return found, len(keys) - len(found)


def read_counts(path: Path) -> list[Count]:
    """Counts as `write_counts` left them; none where there is no file, or one of another version."""
    try:
        return [Count(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _key(count: Count) -> tuple[str, str, str]:
    return count.model, count.method, count.stage
