"""Digests are of whole files, and a large file is read once while it stays as it is."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plugbridge.digests as digests
from plugbridge.digests import cache_file, file_digest
from plugbridge.errors import PlugbridgeError

SIZE = 20_000


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, bool]]:
    """A file's digest as a new process finds it, and whether the file was read for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", SIZE)
    monkeypatch.setattr(digests, "SETTLED", 0)
    read = digests._read
    looked: list[Path] = []
    monkeypatch.setattr(digests, "_read", lambda path, size: looked.append(path) or read(path, size))

    def found(path: Path) -> tuple[str, bool]:
        digests._digest_at.cache_clear()
        looked.clear()
        return file_digest(path), looked == [path.resolve()]

    return found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_large_file_is_read_once_and_whole(read: Callable[[Path], tuple[str, bool]], large: Path) -> None:
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert [read(large) for _ in range(3)] == [(expected, True), (expected, False), (expected, False)]
    (large.parent / "link").symlink_to(large)
    assert read(large.parent / "link") == (expected, False)


def test_a_single_bit_is_seen_whatever_its_times_say(read: Callable[[Path], tuple[str, bool]], large: Path) -> None:
    before, status = read(large)[0], large.stat()
    content = bytearray(large.read_bytes())
    content[SIZE // 2] ^= 1
    large.write_bytes(content)
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp --preserve` and rsync set it
    assert (large.stat().st_size, large.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    changed, again = read(large)
    assert changed != before
    assert again


def test_a_touched_file_is_read_again_and_the_same(read: Callable[[Path], tuple[str, bool]], large: Path) -> None:
    before = read(large)[0]
    os.utime(large)
    assert read(large) == (before, True)
    assert read(large) == (before, False)


def test_what_was_written_just_now_is_not_remembered(
    read: Callable[[Path], tuple[str, bool]], large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write within the file system's resolution would not show in its times."""
    monkeypatch.setattr(digests, "SETTLED", 3600 * 10**9)
    assert [read(large)[1] for _ in range(2)] == [True, True]
    assert not cache_file().exists()


def test_small_files_are_not_remembered(read: Callable[[Path], tuple[str, bool]], large: Path) -> None:
    os.truncate(large, SIZE - 1)
    assert [read(large)[1] for _ in range(2)] == [True, True]
    assert not cache_file().exists()


def test_the_oldest_are_forgotten(
    read: Callable[[Path], tuple[str, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 2)
    paths = [tmp_path / name for name in "cab"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
        read(path)
    assert [read(path)[1] for path in reversed(paths)] == [False, False, True]


@pytest.mark.parametrize("content", ["", "[", "null", "{}", "[1]", '[["x", 1, 2]]', '[["{path}", {stamp}, "00"]]'])
def test_whatever_stands_in_the_cache_is_never_an_error(
    read: Callable[[Path], tuple[str, bool]], large: Path, content: str
) -> None:
    stamp = json.dumps(digests.stamp_of(large))
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content.replace("{path}", str(large)).replace("{stamp}", stamp), encoding="utf-8")
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert [read(large) for _ in range(2)] == [(expected, True), (expected, False)]


def test_a_cache_that_cannot_be_written_only_costs_time(
    read: Callable[[Path], tuple[str, bool]], large: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert [read(large)[1] for _ in range(2)] == [True, True]


def test_long_reading_is_said(
    read: Callable[[Path], tuple[str, bool]], large: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(digests, "BLOCK", 5000)
    monkeypatch.setattr(digests, "PATIENCE", 5.0)
    ticks = iter([0.0, 2.0, 6.0, 8.0, 10.0, 12.0])
    monkeypatch.setattr(digests.time, "monotonic", lambda: next(ticks))
    with caplog.at_level(logging.INFO):
        read(large)
    assert caplog.messages == [f"reading all of {large}, 0.0 GB, to know it again: some 6 s more, this once"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlugbridgeError, match=r"cannot read .*gone: No such file or directory"):
        file_digest(tmp_path / "gone")
