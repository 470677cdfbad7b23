"""Runs that are killed at ten random instants, each, end like undisturbed ones."""

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from test_durability import artefacts, start

KILLS = 10
TRAIN = {"steps": 6, "batch_size": 4, "checkpoint_every": 2}
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "feedback": ("gpt2", "lora", {"couple": {**TRAIN, "mode": "feedback", "fidelity_rows": 2}, "ceiling": None}),
    "standalone": ("t5", "adapter", {"couple": {**TRAIN, "mode": "standalone", "down": "learned"}, "ceiling": None}),
    "ladder": (
        "llama",
        "prefix",
        {
            "couple": {**TRAIN, "mode": "ladder", "cache": "disk"},
            "ceiling": {**TRAIN, "optimizer": "adafactor"},
        },
    ),
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies a process that has imported everything")


def _work(raw: dict[str, Any], root: Path) -> None:
    torch.set_num_threads(1)
    start(raw, root)


def _ended(raw: dict[str, Any], root: Path, after: float | None = None) -> bool:
    """Do a run's work in a copy of this process, killed after so many seconds; whether it came to its end before."""
    copy = multiprocessing.get_context("fork").Process(target=_work, args=(raw, root))
    copy.start()
    copy.join(after)
    copy.kill()
    copy.join()
    assert copy.exitcode in (0, -9), copy.exitcode
    return copy.exitcode == 0


def kill_loop(raw: dict[str, Any], folder: Path, seed: int) -> list[str]:
    """What differs between an undisturbed run and those that were killed; this process has computed nothing."""
    begun = time.monotonic()
    assert _ended(raw, folder / "whole")
    lasting, expected = time.monotonic() - begun, artefacts(folder / "whole")
    rng, kills, runs, found = random.Random(seed), 0, 0, []
    while kills < KILLS:
        root, done = folder / f"killed {runs}", False
        while not done:
            after = lasting * rng.uniform(0.1, 0.5) if kills < KILLS else None  # a run is killed several times
            done = _ended(raw, root, after)
            kills += not done
        runs += 1
        killed = artefacts(root)
        found += [f"{root.name}: {name}" for name in expected | killed if killed.get(name) != expected.get(name)]
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ten_kills_at_random_instants_change_nothing(
    clean: Callable[..., Any], run_config: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    family, method, settings = CONFIGURATIONS[name]
    scored = ["small_tuned", "large_plugged", *(["large_tuned"] if settings["ceiling"] else [])]
    few = {"score": {"samples": 4}, "evaluate": {"batch_size": 8, "limit": 4, "models": scored}}
    raw = run_config(family, method, tune=TRAIN, **few, **settings)
    assert clean(partial(kill_loop, raw, tmp_path, 5)) == []
