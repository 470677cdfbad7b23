"""Disk that a run will need is what its stages then write, and is asked for before the run begins."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugbridge.config import parse_config
from plugbridge.errors import RunError
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import execute, facts_of
from plugbridge.stages.build import build_stages
from plugbridge.stages.room import bridge_room, couple_room

TRAIN = {"steps": 4, "batch_size": 4, "checkpoint_every": 2}
Raw = dict[str, Any]


@pytest.fixture
def begin(run_config: Callable[..., Raw], tmp_path: Path) -> Callable[..., Any]:
    """Prepare a run; returns it and what does it."""

    def make(**changes: Any) -> tuple[Any, Callable[[], None]]:
        raw = run_config(**{"ceiling": None, "tune": TRAIN, "evaluate": {"limit": 4}, **changes})
        prepared = prepare(parse_config(raw, "test"), None)
        stages = build_stages(prepared, tmp_path / "run", Silent())
        return prepared, lambda: execute(tmp_path / "run", stages, None, lambda _stage, _what: None)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bridge_is_as_large_on_disk_as_was_said(begin: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    prepared, run = begin(dtype=dtype, couple={**TRAIN, "mode": "standalone", "optimizer": "adamw"})
    run()
    root = tmp_path / "run"
    count = facts_of(root, "prune")["bridge_model_parameters"]
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert bridge_room(prepared) == width * count
    for folder, least in (("prune", width * count), ("couple", 4 * count)):
        written = (root / folder / "bridge" / "model.safetensors").stat().st_size
        assert least <= written < least + 2**14  # names and places


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_bridge_that_trains_has_room_for_its_checkpoints(
    begin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    prepared, run = begin(couple={**TRAIN, "mode": "standalone", "optimizer": optimizer})
    monkeypatch.setattr("plugbridge.run.CHECKPOINTS", ())  # so that the last one stays
    run()
    each = {"adamw": 12, "adafactor": 4}[optimizer] * (bridge_room(prepared) // 4)
    assert couple_room(prepared) == max(bridge_room(prepared) + each, 2 * each)  # four steps write two; one goes last
    assert (tmp_path / "run" / "couple" / "checkpoint.pt").stat().st_size > each


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, "prune"),
        ({"couple": {**TRAIN, "mode": "standalone"}}, "couple"),
        ({"baselines": {"large_finetuned": TRAIN}}, "large_finetuned"),
    ],
)
def test_too_little_disk_is_said_before_the_run(
    begin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Raw, stage: str
) -> None:
    prepared, run = begin(**changes)
    free = bridge_room(prepared) - (stage == "prune")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free))
    with pytest.raises(RunError, match=rf"stage '{stage}' will write \d+\.\d MB to .*, where \d+\.\d MB are free"):
        run()
    assert not list((tmp_path / "run").glob("[!.]*"))
