"""Baselines of either model: they train what they say, nothing else, resume, and are reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plugbridge.config import parse_config
from plugbridge.errors import ConfigError
from plugbridge.models import load_model, parameter_count
from plugbridge.prepare import prepare
from plugbridge.report import TITLES, read_report
from plugbridge.run import facts_of
from test_durability import start

TRAIN = {"steps": 20, "batch_size": 20, "learning_rate": 5e-3, "checkpoint_every": 8}
ALL = {
    "small_finetuned": TRAIN,
    "large_finetuned": TRAIN,
    "small_ladder": {**TRAIN, "reduction": 2},
    "large_ladder": {**TRAIN, "reduction": 2},
}


def _started(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    start(raw, root)
    return read_report(root)


@pytest.mark.parametrize("family", ["t5", "llama"])  # GPT-2 below
def test_every_baseline_is_trained_scored_and_reported(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, family: str
) -> None:
    raw = run_config(family, baselines=ALL, evaluate={"probe": True, "proxy": True, "batch_size": 8})
    report = _started(raw, tmp_path / "run")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [name for name in TITLES if name != "bridge_coupled"]
    for name in ALL:
        facts = facts_of(tmp_path / "run", name)
        assert facts["loss_last"] < facts["loss_first"], name
        assert rows[name]["parameters"]["trainable"] == facts["trainable"] > 0
        assert rows[name]["seconds"] > 0
    for size in ("small", "large"):
        whole = parameter_count(load_model(raw[size]))
        assert rows[f"{size}_finetuned"]["parameters"]["changed"] == whole
        assert rows[f"{size}_ladder"]["parameters"]["trainable"] < whole
        assert rows[f"{size}_zero_shot"]["parameters"]["trainable"] == 0


def test_fine_tuning_changes_all_weights_and_leaves_the_models_own_files(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = run_config("gpt2", baselines={"large_finetuned": TRAIN})
    source = Path(raw["large"]) / "model.safetensors"
    before = source.read_bytes()
    start(raw, tmp_path / "run", only="large_finetuned")
    assert source.read_bytes() == before
    tuned = load_file(str(tmp_path / "run" / "large_finetuned" / "model" / "model.safetensors"))
    old = load_file(str(source))
    assert tuned.keys() == old.keys()
    same = [name for name, tensor in tuned.items() if torch.equal(tensor, old[name])]
    assert not same


def test_a_side_network_leaves_its_model_as_it_is(run_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = run_config("t5", baselines={"large_ladder": {**TRAIN, "reduction": 2}}, evaluate={"batch_size": 8})
    start(raw, tmp_path / "run", only="large_ladder")
    folder = tmp_path / "run" / "large_ladder" / "side"
    side = load_model(str(folder))
    assert parameter_count(side) < parameter_count(load_model(raw["large"])) / 2
    ladder = load_file(str(folder / "ladder.safetensors"))
    assert any(float(tensor) != 0 for key, tensor in ladder.items() if key.startswith("gate/"))


def test_a_finished_baseline_is_not_done_again_and_follows_its_own_settings_only(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = run_config("gpt2", baselines={"small_finetuned": TRAIN}, ceiling=None, evaluate={"limit": 4})
    root = tmp_path / "run"
    _started(raw, root)
    marker = root / "small_finetuned" / "done.json"
    first, tune = marker.read_bytes(), (root / "tune" / "done.json").read_bytes()
    start(raw, root)
    assert marker.read_bytes() == first
    start({**raw, "baselines": {"small_finetuned": {**TRAIN, "learning_rate": 1e-4}}}, root, redo=True)
    assert marker.read_bytes() != first
    assert (root / "tune" / "done.json").read_bytes() == tune


@pytest.mark.parametrize("name", [*ALL, "small_probe", "large_probe", "large_tuned"])
def test_a_model_that_the_run_does_not_make_is_not_scored(run_config: Callable[..., dict[str, Any]], name: str) -> None:
    raw = run_config("gpt2", ceiling=None, evaluate={"models": [name]})
    with pytest.raises(ConfigError, match=f"names '{name}', which needs"):
        prepare(parse_config(raw, "test"), None)
