"""What a block of work took: measurements inside of others, and what earlier work left behind."""

import mmap
import time
from pathlib import Path

import pytest

from plugbridge.cost import GROUPS, left_by_groups, measure, settle

SIZE = 48 * 2**20


def _held(size: int) -> mmap.mmap:
    """Resident bytes that `close` gives back; an allocator may keep, or have kept, what it was given."""
    held = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        held[page] = 1
    return held


def test_a_measurement_inside_of_another_hides_nothing_of_it() -> None:
    settle()
    with measure("cpu") as whole:
        _held(2 * SIZE).close()
        with measure("cpu", whole.baseline, whole) as part:
            _held(SIZE).close()
    assert whole.peak_bytes > 1.8 * SIZE
    assert part.peak_bytes < 1.5 * SIZE
    settle()  # what other tests left is collected now, not while it is measured
    with measure("cpu") as outer:
        with measure("cpu", outer.baseline, outer):
            _held(SIZE).close()
    assert outer.peak_bytes > 0.8 * SIZE


def test_what_earlier_work_left_counts_over_a_baseline_from_before() -> None:
    baseline = settle()
    left = _held(SIZE)
    with measure("cpu", baseline) as cost:
        pass
    assert cost.peak_bytes > 0.8 * SIZE
    left.close()
    with measure("cpu") as nothing:
        pass
    assert nothing.peak_bytes < 0.5 * SIZE


def test_attempts_add_up_their_seconds_and_the_larger_peak_counts() -> None:
    with measure("cpu") as first:
        held = _held(SIZE)
        time.sleep(0.2)
        spent = first.so_far()
        held.close()
        time.sleep(0.2)  # after the checkpoint: lost with it
    assert 0.2 <= spent["seconds"] < first.seconds - 0.15
    assert spent["peak_bytes"] > 0.8 * SIZE
    settle()
    with measure("cpu") as second:
        second.go_on({**spent, "seconds": 1000.0})
        time.sleep(0.1)
        again = second.so_far()
    assert 1000.1 <= again["seconds"] <= second.seconds < 1100
    assert second.peak_bytes == spent["peak_bytes"]
    with measure("cpu") as third:
        third.go_on({"seconds": 0.0, "peak_bytes": 1, "reserved_bytes": 7})
        _held(SIZE).close()
    assert third.peak_bytes > 0.8 * SIZE
    assert third.reserved_bytes == 7


@pytest.mark.parametrize(("folder", "files"), GROUPS.items())
def test_a_containers_limit_bounds_what_is_free(folder: str, files: tuple[str, str, str], tmp_path: Path) -> None:
    limit, used, cached = files
    group = tmp_path / folder
    group.mkdir(parents=True)
    assert left_by_groups(tmp_path) == []
    (group / limit).write_text("max\n")
    (group / used).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 500\n{cached} 150\nfile 200\n")
    assert left_by_groups(tmp_path) == []
    (group / limit).write_text("1000\n")
    assert left_by_groups(tmp_path) == [450]
    (group / limit).write_text("100\n")
    assert left_by_groups(tmp_path) == [0]
