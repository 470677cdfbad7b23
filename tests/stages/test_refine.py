"""The optional stages, repair and polish, in a whole run: they resume, are reported, and do what they say."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plugbridge.stages.plug as plug_module
from plugbridge.errors import ModelError, TrainingDiverged
from plugbridge.markers import write_marker
from plugbridge.report import read_report
from plugbridge.run import facts_of
from test_durability import start

TRAIN = {"steps": 3, "batch_size": 4, "checkpoint_every": 2}


@pytest.mark.parametrize(("family", "target"), [("gpt2", "response"), ("t5", "logits")])
def test_a_run_with_repair_and_polish(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, family: str, target: str
) -> None:
    mode = "feedback" if target == "response" else "standalone"
    raw = run_config(
        family, "lora", tune=TRAIN, couple={**TRAIN, "mode": mode}, ceiling=None, evaluate={"limit": 8},
        repair={**TRAIN, "target": target}, polish={"evaluations": 6, "rows": 5, "batch_size": 2},
        prune={"reduction": 2},
    )  # fmt: skip
    # of a single token nothing is attended to in T5's decoder, and queries and keys there do not train
    raw["task"] = {**raw["task"], "words": {"even": "yes yes", "odd": "no no"}}
    root = tmp_path / "run"
    start(raw, root)
    report = read_report(root)
    assert [s["name"] for s in report["stages"]][:7] == [
        "tune", "score", "prune", "repair", "couple", "polish", "plug",
    ]  # fmt: skip
    pruned, repaired = (load_file(str(root / s / "bridge" / "model.safetensors")) for s in ("prune", "repair"))
    assert pruned.keys() == repaired.keys()
    assert any(not torch.equal(tensor, repaired[name]) for name, tensor in pruned.items())
    polished = facts_of(root, "polish")
    assert polished["loss_last"] <= polished["loss_first"]
    assert polished["large_rows"] == 6 * 5
    factors = json.loads((root / "polish" / "factors.json").read_text())
    plugged = load_file(str(root / "plug" / "checkpoint" / "adapter_model.safetensors"))
    raw_without = {**raw, "polish": None}
    start(raw_without, root, redo=True)
    plain = load_file(str(root / "plug" / "checkpoint" / "adapter_model.safetensors"))
    for name, tensor in plain.items():
        if "lora_A" in name:
            assert torch.equal(plugged[name], tensor)
    expected = {key.split(":", 1)[1]: factor for key, factor in factors.items()}
    assert expected  # one for each place that carries a module
    scale = [
        float((plugged[name] * tensor).sum() / tensor.square().sum())
        for name, tensor in plain.items()
        if "lora_B" in name and tensor.any()
    ]
    assert sorted(scale) == pytest.approx(sorted(factors.values()), rel=1e-4)


def test_polish_with_a_loss_that_is_not_finite(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config(
        tune=TRAIN, couple=TRAIN, ceiling=None, evaluate={"limit": 8},
        polish={"evaluations": 6, "rows": 5, "batch_size": 5},
    )  # fmt: skip
    given = [math.nan]
    monkeypatch.setattr("plugbridge.stages.plug.mean_loss", lambda *_: given.pop(0))
    with pytest.raises(TrainingDiverged, match=r"the loss is nan with factors of 1: every weight is finite, so it ove"):
        start(raw, tmp_path)
    given += [0.5, math.nan, 0.25, math.inf, -math.inf, 0.75]
    start(raw, tmp_path, only="polish")
    assert json.loads((tmp_path / "polish" / "losses.json").read_text()) == [0.5, None, 0.25, None, None, 0.75]
    assert facts_of(tmp_path, "polish")["loss_last"] == 0.25


def test_an_interrupted_polish_measures_nothing_again(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config(
        tune=TRAIN, couple=TRAIN, ceiling=None, evaluate={"limit": 8},
        polish={"evaluations": 9, "rows": 2, "batch_size": 2},
    )  # fmt: skip
    for stage in ("tune", "score", "prune", "couple"):
        start(raw, tmp_path, only=stage)
    mean_loss, count = plug_module.mean_loss, 0

    def losses(stop: int) -> Callable[..., Any]:
        def loss(*given: Any) -> Any:
            nonlocal count
            if count == stop:
                raise KeyboardInterrupt
            count += 1
            return math.inf if count == 3 else mean_loss(*given)

        return loss

    for stop in (4, 7):
        monkeypatch.setattr(plug_module, "mean_loss", losses(stop))
        with pytest.raises(KeyboardInterrupt):
            start(raw, tmp_path, only="polish")
    monkeypatch.setattr(plug_module, "mean_loss", losses(-1))
    start(raw, tmp_path, only="polish")
    assert count == 9
    left = {name: (tmp_path / "polish" / name).read_bytes() for name in ("factors.json", "losses.json")}
    count = 0
    shutil.rmtree(tmp_path / "polish")
    start(raw, tmp_path, only="polish")
    assert left == {name: (tmp_path / "polish" / name).read_bytes() for name in left}
    shutil.rmtree(tmp_path / "polish")
    monkeypatch.setattr(plug_module, "mean_loss", losses(count + 2))
    with pytest.raises(KeyboardInterrupt):
        start(raw, tmp_path, only="polish")
    path = tmp_path / "polish" / "checkpoint.json"
    path.write_text('{"losses": [0.5], "cost": {}}', encoding="utf-8")
    for found in (None, {"losses": ["x"], "cost": {}}, {"losses": [0.5], "cost": {}}):  # without its seal, and with it
        if found is not None:
            write_marker(path, found)
        with pytest.raises(ModelError, match=r"checkpoint.json is damaged; delete it to start the stage anew"):
            start(raw, tmp_path, only="polish")


def test_a_stage_that_the_run_does_not_have_is_refused(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from plugbridge.errors import RunError

    raw = run_config("gpt2", "lora", tune=TRAIN, couple=TRAIN)
    for stage in ("repair", "polish"):
        with pytest.raises(RunError, match=f"no stage '{stage}'.*`{stage}:` section"):
            start(raw, tmp_path / "run", only=stage)
