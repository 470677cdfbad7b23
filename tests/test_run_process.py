"""`plugbridge run` as a user starts it: every stage is a process of its own, and its end is told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plugbridge.markers import read_marker
from plugbridge.run import facts_of

Raw = dict[str, Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere stages share the command's process")


@pytest.fixture
def begin(run_config: Callable[..., Raw], toy: Raw, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a run in a session of its own, as from a terminal."""

    def start(steps: int, every: int = 5) -> subprocess.Popen[str]:
        train = {"steps": 2, "batch_size": 4}
        couple = {"steps": steps, "batch_size": 4, "checkpoint_every": every}
        raw = run_config(tune=train, couple=couple, ceiling=None, evaluate={"limit": 8}, task=dict(toy))
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        words = [sys.executable, "-m", "plugbridge", "run", "toy.yaml", "--out", "run"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, cwd=tmp_path, text=True, start_new_session=True, **pipes)

    return start


def _stage_of(parent: subprocess.Popen[str], checkpoint: Path) -> int:
    """The process of the stage that writes a checkpoint, once it has."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    for _ in range(1200):
        if checkpoint.is_file() and checkpoint.stat().st_mtime_ns > before and (found := children.read_text().split()):
            return int(found[-1])
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    raise AssertionError("no checkpoint")


def _child_of(parent: subprocess.Popen[str]) -> None:
    """Wait for the process of the first stage."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not children.read_text().split():
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.001)


def test_stages_do_not_count_each_others_memory(begin: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    out, err = (run := begin(steps=2)).communicate()
    assert run.returncode == 0, err
    assert "large, plugged" in out
    peaks = {}
    for stage in ("tune", "score", "prune", "couple", "plug", "evaluate"):
        marker = read_marker(tmp_path / "run" / stage)
        assert marker is not None
        peaks[stage] = marker["peak_bytes"]
    # what other stages left would be some 70 MiB, libraries at first use as much
    assert max(peaks.values()) < 2**24
    assert peaks["couple"] > 2**18
    assert facts_of(tmp_path / "run", "couple")["loss_last"] > 0


def test_a_stage_that_is_killed_or_interrupted_is_told_and_resumed(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "couple" / "checkpoint.pt"

    def steps() -> int:
        return len(torch.load(checkpoint, weights_only=True)["losses"])

    run = begin(steps=4000)
    os.kill(_stage_of(run, checkpoint), signal.SIGKILL)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 2
    assert "error: stage 'couple' was killed, by the system if memory ran out" in err
    assert "Traceback" not in err + out
    assert json.loads((tmp_path / "run" / "tune" / "done.json").read_text())["stage"] == "tune"
    kept = steps()

    run = begin(steps=4000, every=3)
    couple = _stage_of(run, checkpoint)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    out, err = run.communicate(timeout=600)
    assert run.returncode == 130, err
    assert err.endswith("interrupted; run the same command again to resume\n")
    assert "Traceback" not in err + out
    assert not Path(f"/proc/{couple}").exists()
    assert f"resuming at step {kept} from" in err
    kept = steps()
    assert f"stopped behind step {kept}, which is kept" in err

    run = begin(steps=4000, every=4000)
    for line in run.stderr or ():
        if "resuming at step" in line:
            break
    os.kill(run.pid, signal.SIGTERM)  # the command alone, as a scheduler does
    _, err = run.communicate(timeout=600)
    assert run.returncode == 143, err
    assert f"resuming at step {kept} from" in line
    assert steps() >= kept


@pytest.mark.parametrize("moment", ["import", "stage"])
def test_an_early_interrupt_leaves_no_traceback(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path, moment: str
) -> None:
    run = begin(steps=4)
    if moment == "import":
        for _ in range(600):
            if "torch" in Path(f"/proc/{run.pid}/maps").read_text():
                break
            time.sleep(0.01)
    else:
        _child_of(run)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 130, err
    assert "Traceback" not in err + out
    assert err.endswith("interrupted; run the same command again to resume\n")
