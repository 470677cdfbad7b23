"""Forward-only peers, MeZO and proxy-tuning, in whole runs: whatever way the large model is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugbridge.report import TITLES, read_report
from plugbridge.run import facts_of
from test_durability import start

Raw = dict[str, Any]
TRAIN = {"steps": 3, "batch_size": 4}
MODELS = ["small_tuned", "large_zero_shot", "large_proxy", "large_plugged"]
Run = Callable[..., tuple[Path, list[float], Raw]]


@pytest.fixture
def run(run_config: Callable[..., Raw], tmp_path: Path) -> Run:
    """Run both; returns where, coupling's losses and the scores of every row by model."""

    def whole(out: str, family: str, method: str, **changes: Any) -> tuple[Path, list[float], Raw]:
        couple = {**TRAIN, "mode": "mezo", "plug": "random", "perturbation": 0.01}
        evaluate = {"limit": 8, "models": MODELS, "proxy": True}
        raw = run_config(family, method, tune=TRAIN, couple=couple, ceiling=None, evaluate=evaluate, **changes)
        root = tmp_path / out
        assert list(start(raw, root)) == ["tune", "couple", "plug", "evaluate"]
        scores: Raw = {}
        for name in MODELS:
            lines = (root / "evaluate" / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            scores[name] = [value for line in lines for value in json.loads(line)["scores"].values()]
        return root, json.loads((root / "couple" / "losses.json").read_text(encoding="utf-8")), scores

    return whole


def test_peers_are_run_and_reported(run: Run) -> None:
    root, losses, scores = run("whole", "t5", "prefix")
    report = read_report(root)
    assert [row["name"] for row in report["rows"]] == MODELS
    assert TITLES["large_proxy"] == "large, proxy-tuned"
    assert report["models"]["bridge"] is None
    assert report["coupling"]["large_rows"] == facts_of(root, "couple")["large_rows"] == 2 * 3 * 4
    tuned, _, proxy, plugged = report["rows"]
    assert proxy["parameters"] == tuned["parameters"]
    assert (proxy["seconds"], proxy["n"]) == (tuned["seconds"], 8)
    assert plugged["parameters"]["trainable"] > 0
    assert len({tuple(found) for found in scores.values()}) == len(MODELS)
    assert len(set(losses)) == 3


def test_the_large_model_may_be_on_disk_or_quantised(run: Run, pairs: Callable[[str], tuple[Path, Path]]) -> None:
    _, losses, scores = run("whole", "gpt2", "lora")
    _, streamed, same = run("streamed", "gpt2", "lora", resident="none")
    assert streamed == pytest.approx(losses, rel=1e-4)
    assert same["large_proxy"] == pytest.approx(scores["large_proxy"], rel=1e-4, abs=1e-5)
    large = {"path": str(pairs("gpt2")[1]), "load_in": "8bit"}
    root, quantised, near = run("quantised", "gpt2", "lora", large=large)
    assert read_report(root)["models"]["large"]["load_in"] == "8bit"
    assert quantised != losses
    assert quantised == pytest.approx(losses, rel=0.2)
    assert near["large_proxy"] == pytest.approx(scores["large_proxy"], rel=0.2, abs=0.3)
