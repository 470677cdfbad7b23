"""Tensors on the shelf come back as they were, and small ones leave no grown heap behind."""

from pathlib import Path

import pytest
import torch

from plugbridge.cost import GIVEN_BACK
from plugbridge.shrink.shelf import TRIMMED, Shelf


def test_what_is_put_away_comes_back(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "states.bin")
    whole = [torch.randn(3, 5), torch.arange(7), torch.randn(2, 4).bfloat16().mT]
    kept = [tensor.clone() for tensor in whole]
    for tensor in whole:
        shelf.put(tensor)
        assert tensor.numel() == 0
    assert list(tmp_path.iterdir()) == []  # the file has no name
    for tensor, wanted in zip(whole, kept, strict=True):
        shelf.take(tensor)
        assert torch.equal(tensor, wanted)
    longest = shelf.bytes
    del tensor, whole
    shelf.put(torch.randn(3, 5))
    assert shelf.bytes == longest  # where the first one was


@pytest.mark.parametrize(("nbytes", "count", "times"), [(TRIMMED // 16, 40, 2), (GIVEN_BACK, 40, 0)])
def test_the_heap_is_trimmed_behind_small_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, count: int, times: int
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr("plugbridge.shrink.shelf.trim", lambda: trimmed.append(1))
    shelf = Shelf(tmp_path / "states.bin")
    for tensor in [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]:
        shelf.put(tensor)
    assert len(trimmed) == times
