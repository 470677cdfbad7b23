"""Runs by backpropagation through the large model block by block, and ceilings of large models that are streamed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plugbridge.config import parse_config
from plugbridge.errors import ConfigError
from plugbridge.prepare import prepare
from plugbridge.run import facts_of
from test_durability import Recorder, artefacts, only_of, start

Raw = dict[str, Any]
TRAIN: Raw = {"steps": 4, "batch_size": 4, "checkpoint_every": 1, "micro_batch": 3}
ADAPTER = "adapter_model.safetensors"


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


def test_a_run_that_was_killed_at_a_step_ends_like_one_that_was_not(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPT-2, which drops numbers of its own; neither Bridge nor small model are made."""
    raw = run_config(
        resident="none", couple={**TRAIN, "mode": "backprop"}, ceiling=None,
        evaluate={"models": ["large_plugged"], "limit": 8},
    )  # fmt: skip
    raw["method"]["dropout"] = 0.2
    del raw["prune"], raw["score"]
    assert start(raw, tmp_path / "whole") == dict.fromkeys(("couple", "plug", "evaluate"), "running")
    replace, seen = Path.replace, [0]

    def killing(self: Path, target: Path) -> Path:
        if target.name == "checkpoint.pt":
            seen[0] += 1
            if seen[0] == 3:
                raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killing)
    with pytest.raises(Killed):
        start(raw, tmp_path / "killed")
    monkeypatch.undo()
    progress = Recorder()
    start({**raw, "resident": "none"}, tmp_path / "killed", progress=progress)
    assert progress.began["couple (backprop)"] == 2
    stages = ("couple", "plug", "evaluate")
    assert only_of(artefacts(tmp_path / "killed"), *stages) == only_of(artefacts(tmp_path / "whole"), *stages)
    facts = facts_of(tmp_path / "whole", "couple")
    assert facts["large_rows"] == TRAIN["steps"] * TRAIN["batch_size"]
    assert facts["trainable"]["bridge"] == 0 < facts["trainable"]["module"]


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("llama", "prefix"), ("t5", "adapter")])
def test_a_streamed_ceiling_is_the_resident_one_and_what_backprop_gives(
    run_config: Callable[..., Raw], tmp_path: Path, family: str, method: str
) -> None:
    raw = run_config(
        family, method, couple={**TRAIN, "mode": "backprop"}, ceiling=TRAIN,
        evaluate={"models": ["large_tuned", "large_plugged"], "limit": 4},
    )  # fmt: skip
    if family == "t5":
        raw["large"] = _without_dropout(Path(raw["large"]), tmp_path / "large")
    losses: dict[str, list[float]] = {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for resident in ("all", "none"):
        root = tmp_path / resident
        start({**raw, "resident": resident}, root)
        for stage, folder in (("ceiling", "module"), ("plug", "checkpoint")):
            found[f"{stage} {resident}"] = load_file(root / stage / folder / ADAPTER)
        for stage in ("ceiling", "couple"):
            losses[f"{stage} {resident}"] = json.loads((root / stage / "losses.json").read_text())
    wanted = found.pop("ceiling all")
    for name, other in found.items():
        assert other.keys() == wanted.keys(), name
        both = [torch.cat([part[key].flatten() for key in wanted]) for part in (other, wanted)]
        assert float((both[0] - both[1]).norm()) <= 1e-3 * float(both[1].norm()), name
    for name, values in losses.items():
        assert values == pytest.approx(losses["ceiling all"], rel=1e-5), name


def _without_dropout(source: Path, folder: Path) -> str:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}), encoding="utf-8")
    return str(folder)


def test_a_streamed_ceiling_goes_on_in_memory_and_back(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits depends on what is free: a step checkpoint is of either way."""
    raw = run_config("llama", ceiling=TRAIN, evaluate={"models": ["large_tuned"], "limit": 4})
    replace, seen = Path.replace, [0]

    def killing(self: Path, target: Path) -> Path:
        if target.name == "checkpoint.pt":
            seen[0] += 1
            if seen[0] in (2, 4):
                raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killing)
    for resident in ("none", "all"):
        with pytest.raises(Killed):
            start({**raw, "resident": resident}, tmp_path / "run")
    progress = Recorder()
    start({**raw, "resident": "none"}, tmp_path / "run", progress=progress)
    assert progress.began["tune large (ceiling)"] == 2
    start({**raw, "resident": "all"}, tmp_path / "whole")
    one, other = (json.loads((tmp_path / run / "ceiling" / "losses.json").read_text()) for run in ("run", "whole"))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("couple", {"recompute": False}, "couple.recompute is False, but in mode 'backprop' every block is run again"),
        ("couple", {"bridge": "freeze"}, "in mode 'backprop' the Bridge never trains"),
        ("couple", {"activations": "large"}, "in mode 'backprop' no error goes back through the Bridge"),
        ("couple", {"down": "learned"}, "in mode 'backprop' no loss goes through down"),
        ("couple", {"cache": "memory"}, "mode 'backprop' keeps no activations"),
        ("prune", {"reduction": 2, "bits": 3}, "prune.bits is 3, but in mode 'backprop' there is no Bridge"),
        ("repair", {"steps": 1}, "in mode 'backprop' there is no Bridge to fit"),
        ("evaluate", {"models": ["bridge_coupled"]}, "in 'backprop' it is no model"),
    ],
)
def test_what_cannot_act_is_refused(run_config: Callable[..., Raw], key: str, value: Raw, said: str) -> None:
    raw = run_config(couple={"steps": 2, "mode": "backprop"})
    raw[key] = {**raw.get(key, {}), **value}
    with pytest.raises(ConfigError, match=said):
        prepare(parse_config(raw, "test"), None)
