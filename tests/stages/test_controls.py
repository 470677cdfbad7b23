"""Controls and references from the command line: each run finishes and reports what it scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import test_cli
from plugbridge.report import recovered
from plugbridge.run import facts_of
from test_cli import ROWS, Call, mistake

call = test_cli.call  # fixtures
Raw = dict[str, Any]
WITH_BRIDGE = [*ROWS[:-1], "bridge_coupled", ROWS[-1]]


@pytest.fixture
def run(call: Call, run_config: Callable[..., Raw], tmp_path: Path) -> Callable[..., Raw]:
    """Run a configuration; returns its report, which has a picture too."""

    def whole(*, ceiling: Raw | None = None, evaluate: Raw | None = None, **changes: Any) -> Raw:
        train = {"steps": 2, "batch_size": 4}
        raw = run_config(tune=train, ceiling=ceiling, evaluate={"limit": 8, **(evaluate or {})}, **changes)
        couple = changes.get("couple", {})
        raw["couple"] = {**({} if couple.get("steps") == 0 else train), **couple}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        code, out, err = call("run", "run.yaml", "--out", "run", "--quiet")
        assert (code, err) == (0, "")
        assert "large, plugged" in out
        assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
        code, out, err = call("report", "run", "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return whole


def test_without_a_step_the_tuned_module_is_plugged_in_as_it_starts(run: Callable[..., Raw], tmp_path: Path) -> None:
    found = run(couple={"mode": "standalone", "plug": "random", "steps": 0})
    assert [row["name"] for row in found["rows"]] == WITH_BRIDGE
    facts = facts_of(tmp_path / "run", "couple")
    assert (facts["loss_first"], facts["loss_last"], facts["large_rows"]) == (None, None, 0)
    assert json.loads((tmp_path / "run" / "couple" / "losses.json").read_text()) == []
    tuned = load_file(str(tmp_path / "run" / "tune" / "module" / "adapter_model.safetensors"))
    coupled = load_file(str(tmp_path / "run" / "couple" / "coupled.safetensors"))
    module = {name: tensor for name, tensor in coupled.items() if name.startswith("module/")}
    assert len(module) == 3 * len(tuned)  # three large layers, one small one
    for name, tensor in module.items():
        assert torch.equal(tensor, next(t for key, t in tuned.items() if key.endswith(name.split(":")[-1]))), name
    bridges = [
        load_file(str(tmp_path / "run" / stage / "bridge" / "model.safetensors")) for stage in ("prune", "couple")
    ]
    assert bridges[0].keys() == bridges[1].keys()
    assert all(torch.equal(tensor, bridges[1][name]) for name, tensor in bridges[0].items())
    plugs = [tensor for name, tensor in coupled.items() if name.startswith("plug/")]
    assert plugs
    assert all(torch.allclose(m.mT @ m, torch.eye(m.shape[-1]), atol=1e-5) for plug in plugs for m in plug)


@pytest.mark.parametrize(
    ("family", "couple", "channels"),
    [
        ("t5", {"mode": "identity", "plug": "fresh"}, "select"),
        ("gpt2", {"mode": "ladder_delta", "plug": "fresh", "cache": "memory", "layers": 0.5}, "gradient_pca"),
    ],
    ids=lambda value: value["mode"] if isinstance(value, dict) else None,
)
def test_modes_whose_bridge_does_not_train(
    run: Callable[..., Raw], tmp_path: Path, family: str, couple: Raw, channels: str
) -> None:
    found = run(family=family, couple=couple, prune={"reduction": 2, "channels": channels})
    assert found["mode"] == couple["mode"]
    assert [row["name"] for row in found["rows"]] == ROWS
    facts = facts_of(tmp_path / "run", "couple")
    assert facts["trainable"]["module"] > 0
    assert facts["trainable"]["bridge"] == facts["trainable"]["ladder"] == 0
    assert 0 < facts["large_rows"] <= 2 * 4
    assert (facts["cache_bytes"] > 0) == ("cache" in couple)
    assert len(json.loads((tmp_path / "run" / "couple" / "losses.json").read_text())) == 2
    assert not (tmp_path / "run" / "couple" / "bridge").exists()
    plugged = load_file(str(tmp_path / "run" / "plug" / "checkpoint" / "adapter_model.safetensors"))
    assert any(bool(tensor.any()) for name, tensor in plugged.items() if "lora_B" in name)  # it was zero


def test_a_shuffled_bridge_and_a_probe(call: Call, run: Callable[..., Raw], tmp_path: Path) -> None:
    found = run(
        couple={"mode": "feedback", "plug": "fresh"}, prune={"reduction": 2, "shuffle": True}, evaluate={"probe": True}
    )
    assert [row["name"] for row in found["rows"]] == [ROWS[0], "small_probe", *ROWS[1:-1], "large_probe", ROWS[-1]]
    facts = facts_of(tmp_path / "run", "evaluate")
    assert set(facts) == {*ROWS, "small_probe", "large_probe", "majority", "cut", "remarks", "models"}
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "evaluate" / "predictions" / "large_probe.jsonl").read_text().splitlines()
    ]
    hits = sum(row["prediction"] == row["right"] for row in rows)
    assert len(rows) == facts["large_probe"]["n"] == 8
    assert facts["large_probe"]["metrics"]["accuracy"] == hits / 8
    scored = (tmp_path / "run" / "evaluate" / "predictions" / "large_plugged.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in scored] == [row["right"] for row in rows]
    bridges, losses = [], []
    for again in (False, True):
        if again:
            for stage in ("prune", "couple"):
                words = (stage, "run.yaml", "--out", "run", "--quiet", "--redo", "--set", "prune.shuffle=false")
                assert call(*words) == (0, f"{stage}: done, in run/{stage}\n", "")
        bridges.append(load_file(str(tmp_path / "run" / "prune" / "bridge" / "model.safetensors")))
        losses.append(json.loads((tmp_path / "run" / "couple" / "losses.json").read_text()))
    for name, tensor in bridges[0].items():
        assert torch.equal(tensor.flatten().sort().values, bridges[1][name].flatten().sort().values), name
        assert torch.equal(tensor, bridges[1][name]) == (".h." not in name), name
    assert losses[0][0] == losses[1][0]  # the forward pass is exact
    assert losses[0][1] != losses[1][1]  # the way back is through the Bridge


def test_a_run_that_scores_some_models_reports_these(call: Call, run: Callable[..., Raw], tmp_path: Path) -> None:
    train = {"steps": 1, "batch_size": 4}
    found = run(couple={"mode": "standalone"}, ceiling=train, evaluate={"models": ["large_tuned", "large_plugged"]})
    assert [row["name"] for row in found["rows"]] == ["large_plugged", "large_tuned"]
    assert found["pgr"] is None
    words = ("evaluate", "run.yaml", "--out", "run", "--quiet", "--redo", "--set")
    for models in (["bridge_coupled"], ["small_tuned", "large_tuned"]):
        assert call(*words, f"evaluate.models={models}")[0] == 0
        code, out, _ = call("report", "run", "--json")
        assert code == 0
        assert [row["name"] for row in json.loads(out)["rows"]] == models
        assert call("report", "run")[0] == 0
    before = test_cli.stamps(tmp_path / "run")
    line = mistake(call(*words, "evaluate.models=[large_pluged]"))
    assert "evaluate.models.0: Input should be 'small_zero_shot', 'small_probe', 'small_tuned'," in line
    line = mistake(call(*words, "evaluate.models=[large_probe]"))
    assert line == "evaluate.models names 'large_probe', which needs evaluate.probe: true"
    assert "evaluate.models: List should have at least 1 item" in mistake(call(*words, "evaluate.models=[]"))
    assert test_cli.stamps(tmp_path / "run") == before


def test_no_gap_is_recovered_of_what_was_not_scored() -> None:
    values = {"small_tuned": 0.4, "large_plugged": 0.5, "large_tuned": 0.6}
    assert recovered(values, 1000) == pytest.approx(0.5)
    assert all(recovered({n: v for n, v in values.items() if n != name}, 1000) is None for name in values)
