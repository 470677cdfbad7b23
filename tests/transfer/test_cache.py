"""Caches of activations give back what they were given, and the one on disk leaves nothing behind."""

import gc
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plugbridge.errors import RunError
from plugbridge.tasks.encode import Encoded
from plugbridge.transfer.cache import ActivationCache, DiskCache, MemoryCache, make_cache

KINDS = ("memory", "disk")
ROWS = [Encoded((8 + i,), ((3,), (4,)), 0) for i in range(4)]


def _cache(kind: str, folder: Path) -> ActivationCache:
    made = make_cache(kind, folder)
    assert isinstance(made, {"memory": MemoryCache, "disk": DiskCache}[kind])
    return made


def _tensors(length: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One row's tensors: two stacks of different lengths and widths, one of them a strided view."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(length, 5, generator=generator).to(dtype)
    return {"encoder:0": first, "decoder:end": torch.randn(3, 6, generator=generator).to(dtype).mT[:, :2]}


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def test_off_is_no_cache() -> None:
    assert make_cache("off", None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_what_was_added_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cache = _cache(kind, tmp_path)
    given = {row: _tensors(length, length, dtype) for row, length in zip(ROWS, (4, 1, 7, 2), strict=True)}
    given[ROWS[0]]["encoder:0"][0] = torch.tensor([float("inf"), -0.0, float("nan"), 1e-7, 3.0]).to(dtype)
    for row, tensors in given.items():
        assert row not in cache
        cache.add(row, tensors)
        assert row in cache
    assert Encoded(*(getattr(ROWS[2], name) for name in ("prompt", "options", "answer"))) in cache  # an equal one
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for row in reversed(ROWS):
        for name, tensor in cache.get([row]).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor[0].view(integers), given[row][name].contiguous().view(integers))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_the_order_asked_and_padded_with_zeros_on_the_right(kind: str, tmp_path: Path) -> None:
    cache = _cache(kind, tmp_path)
    given = [_tensors(length, length) for length in (2, 5, 3)]
    for row, tensors in zip(ROWS, given, strict=False):
        cache.add(row, tensors)
    order = [1, 0, 2, 1]
    found = cache.get([ROWS[i] for i in order])
    wanted = {
        "encoder:0": torch.zeros(4, 5, 5),
        "decoder:end": torch.stack([given[i]["decoder:end"] for i in order]),
    }
    for place, i in enumerate(order):
        wanted["encoder:0"][place, : len(given[i]["encoder:0"])] = given[i]["encoder:0"]
    assert _equal(found, wanted)
    assert cache.get([ROWS[0]])["encoder:0"].shape == (1, 2, 5)  # no longer than the rows asked for


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_added_after_others_were_read(kind: str, tmp_path: Path) -> None:
    cache = _cache(kind, tmp_path)
    for i, row in enumerate(ROWS):
        cache.add(row, _tensors(3, i))
        for j in range(i, -1, -1):  # the first one last
            assert _equal(cache.get([ROWS[j]]), {name: t[None] for name, t in _tensors(3, j).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_added_and_what_was_given_are_copies(kind: str, tmp_path: Path) -> None:
    cache = _cache(kind, tmp_path)
    tensors = _tensors(3, 0)
    cache.add(ROWS[0], tensors)
    for changed in (tensors, cache.get([ROWS[0], ROWS[0]])):
        for tensor in changed.values():
            tensor.zero_()
    assert _equal(cache.get([ROWS[0]]), {name: t[None] for name, t in _tensors(3, 0).items()})


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind: str, tmp_path: Path) -> None:
    cache = _cache(kind, tmp_path)
    assert cache.bytes == 0
    cache.add(ROWS[0], _tensors(4, 0))
    assert cache.bytes == 4 * (4 * 5 + 6 * 2)
    cache.add(ROWS[1], _tensors(1, 0, torch.bfloat16))
    assert cache.bytes == 4 * (4 * 5 + 6 * 2) + 2 * (1 * 5 + 6 * 2)
    cache.get(ROWS[:2])
    assert cache.bytes == 4 * (4 * 5 + 6 * 2) + 2 * (1 * 5 + 6 * 2)


def test_the_file_on_disk_is_never_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "couple"
    cache = _cache("disk", folder)
    for i, row in enumerate(ROWS):
        cache.add(row, _tensors(500, i))
    cache.get(ROWS)
    assert list(tmp_path.rglob("*")) == [folder]
    other = _cache("disk", folder)  # of another process, say
    other.add(ROWS[0], _tensors(2, 9))
    assert _equal(cache.get([ROWS[0]]), {name: t[None] for name, t in _tensors(500, 0).items()})
    del cache, other
    gc.collect()
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _cache("disk", tmp_path)
    cache.add(ROWS[0], _tensors(4, 0))
    asked: list[Path] = []

    def usage(free: int):
        def disk_usage(path: Path):
            asked.append(path)
            return namedtuple("usage", "total used free")(10**9, 10**9 - free, free)

        return disk_usage

    need = sum(tensor.nbytes for tensor in _tensors(4, 1).values())
    monkeypatch.setattr("shutil.disk_usage", usage(need - 1))
    with pytest.raises(RunError) as caught:
        cache.add(ROWS[1], _tensors(4, 1))
    line = str(caught.value)
    assert line.startswith(f"no room for the cache of activations in {tmp_path}: 0 MB written for 1 rows; ")
    assert "\n" not in line
    assert "couple.cache: off" in line
    assert asked == [tmp_path]
    assert ROWS[1] not in cache
    assert _equal(cache.get([ROWS[0]]), {name: t[None] for name, t in _tensors(4, 0).items()})
    monkeypatch.setattr("shutil.disk_usage", usage(need))
    cache.add(ROWS[1], _tensors(4, 1))
    assert _equal(cache.get([ROWS[1]]), {name: t[None] for name, t in _tensors(4, 1).items()})
