"""Memory counted in several calls."""

import time
from pathlib import Path

from plugbridge.bench.memory import Count, rows_of
from plugbridge.bench.memory_page import MEMORY, memory_page
from plugbridge.bench.memory_resume import go_on, read_counts
from plugbridge.memory.rows import Row
from plugbridge.memory.shapes import Shape, find_shapes

SHAPE = find_shapes("tiny")[0]
WANTED = [(SHAPE, row) for row in rows_of(SHAPE, "cpu")]


def _count(shape: Shape, row: Row) -> Count:
    return Count(shape.name, 1, 1, row.method, row.stage, 2, 2, 0.1, False, 1.0, "a command")


def test_a_call_counts_a_row_at_least_and_the_next_goes_on(tmp_path: Path) -> None:
    path, now = tmp_path / "memory.json", time.monotonic()
    first, left = go_on(WANTED, path, "a command", now, _count)
    assert (len(first), left) == (1, len(WANTED) - 1)
    assert read_counts(path) == first
    assert f"| {first[0].method} |" in memory_page(first, MEMORY, "a command")  # LoRA, the measure, is not there yet
    calls: list[str] = []

    def noted(shape: Shape, row: Row) -> Count:
        calls.append(row.method)
        return _count(shape, row)

    everything, left = go_on(WANTED, path, "a command", now + 3600, noted)
    assert left == 0
    assert len(calls) == len(WANTED) - 1
    assert [(c.method, c.stage) for c in everything] == [(row.method, row.stage) for _, row in WANTED]


def test_counts_of_another_command_or_version_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    go_on(WANTED, path, "a command", time.monotonic() + 3600, _count)
    _, left = go_on(WANTED, path, "another command", time.monotonic(), _count)
    assert left == len(WANTED) - 1
    path.write_text('[{"model": "x"}]', encoding="utf-8")
    assert read_counts(path) == []
