"""Every way to couple runs from end to end, leaves what it says it leaves, and survives a kill."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plugbridge.config import parse_config
from plugbridge.errors import NotFinite, TrainingDiverged
from plugbridge.models import layout_for, load_model
from plugbridge.preflight import resolve
from plugbridge.prepare import Prepared, prepare
from plugbridge.progress import Silent
from plugbridge.report import TITLES
from plugbridge.run import borrow, facts_of, locked
from plugbridge.stages.build import build_stages
from plugbridge.stages.work import schedule_of
from plugbridge.tasks.encode import Batch
from plugbridge.train import _seal
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.fidelity import Fidelity, WaysBack
from plugbridge.transfer.ladder import Backbone
from plugbridge.tuners.module import read, unpack
from plugbridge.tuners.table import METHODS as TABLE
from test_durability import Recorder, artefacts, start

Raw = dict[str, Any]
Couple = Callable[..., tuple[Raw, Path]]
PLAIN = {
    "steps": 5, "batch_size": 4, "checkpoint_every": 2,
    "mode": "standalone", "plug": "random", "layer_map": "uniform", "layers": 1.0,
}  # fmt: skip
PARTS = ("module", "plug", "ladder")


@pytest.fixture(scope="module")
def donors() -> dict[tuple[str, ...], Path]:
    """Runs whose first stages others may borrow, by what those depend on."""
    return {}


@pytest.fixture
def couple(
    run_config: Callable[..., Raw],
    donors: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Couple:
    """Prepare a run for coupling with these settings, everything before it done; returns its configuration and root."""

    def ready(family: str = "gpt2", method: str = "lora", dtype: str = "float32", **settings: Any) -> tuple[Raw, Path]:
        rest = {
            "prune": {"reduction": 2, "channels": "select"},
            "ceiling": None,
            "evaluate": {"batch_size": 8, "limit": 8},
            "tune": {"steps": 2, "batch_size": 4},
        }
        raw = run_config(family, method, couple={**PLAIN, **settings}, dtype=dtype, **rest)
        key = (family, method, dtype, str(find_mode(raw["couple"]["mode"]).reads_tokens))
        if key not in donors:
            donors[key] = tmp_path_factory.mktemp("donor")
            for stage in ("tune", "score", "prune"):
                start(raw, donors[key], only=stage)
        root = tmp_path_factory.mktemp("run")
        with locked(root):
            borrow(root, [donors[key]], build_stages(prepare(parse_config(raw, "test"), None), root, Silent()))
        return raw, root

    return ready


def _plugged(raw: Raw, root: Path) -> dict[tuple[str, int], bool]:
    """Whether the module on the large model, by stack and layer, is anything but zero."""
    layout = layout_for(load_model(raw["large"]))
    found: dict[tuple[str, int], bool] = {}
    for slot, tensor in unpack(TABLE[raw["method"]["name"]], layout, read(root / "plug" / "checkpoint")).items():
        found[slot.stack, slot.layer] = found.get((slot.stack, slot.layer), False) or bool(tensor.any())
    return found


WAYS: dict[str, tuple[str, str, Raw]] = {
    "ladder memory": ("gpt2", "lora", {"mode": "ladder", "cache": "memory"}),
    "ladder disk, ridge, upper layers": (
        "t5",
        "adapter",
        {"mode": "ladder", "cache": "disk", "plug": "ridge", "layers": 0.5},
    ),
    "procrustes, cka": ("t5", "adapter", {"plug": "procrustes", "layer_map": "cka"}),
    "fresh": ("gpt2", "lora", {"plug": "fresh"}),
    "feedback, ridge, cka, upper layers": (
        "llama",
        "prefix",
        {"mode": "feedback", "plug": "ridge", "layer_map": "cka", "layers": 0.5},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_couple_runs_from_end_to_end(couple: Couple, way: str) -> None:
    family, method, settings = WAYS[way]
    fitted = settings.get("plug") in ("ridge", "procrustes")
    raw, root = couple(family, method, **({"align_samples": 6} if fitted else {}), **settings)
    said = start(raw, root)
    assert [stage for stage, what in said.items() if what == "running"] == ["couple", "plug", "evaluate"]
    facts = facts_of(root, "couple")
    losses = json.loads((root / "couple" / "losses.json").read_text())
    assert len(losses) == PLAIN["steps"]
    assert (facts["loss_first"], facts["loss_last"]) == (losses[0], losses[-1])
    assert (facts["cache_bytes"] > 0) == ("cache" in settings)
    assert not list(root.rglob("activations*"))

    first, fresh = 1 if settings.get("layers") == 0.5 else 0, settings.get("plug") == "fresh"
    layers = [0, 1, 2] if fresh else [0, 0, 0]  # the small model has one layer
    assert facts["layer_map"] == dict.fromkeys(("encoder", "decoder") if family == "t5" else ("decoder",), layers)
    saved = load_file(str(root / "couple" / "coupled.safetensors"))
    kept = {name: t for name, t in saved.items() if not name.startswith("module/") or int(name.split(":")[1]) >= first}
    counts = {part: sum(t.numel() for n, t in kept.items() if n.startswith(f"{part}/")) for part in PARTS}
    assert {part: facts["trainable"][part] for part in PARTS} == counts
    assert (counts["ladder"] > 0) == (settings.get("mode") == "ladder")
    assert (counts["plug"] == 0) == fresh

    used = _plugged(raw, root)
    if method != "prefix":  # a prefix cannot be silent
        assert used == {(stack, layer): layer >= first for stack in facts["layer_map"] for layer in range(3)}
    assert any(used.values())
    scored = facts_of(root, "evaluate")
    assert ("bridge_coupled" in scored) == (settings.get("mode") != "feedback")
    assert len({(root / "evaluate" / "predictions" / f"{n}.jsonl").read_text() for n in scored if n in TITLES}) > 2


def test_a_fresh_start_without_the_large_models_forward_pass_leaves_it_on_disk(
    couple: Couple, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, root = couple(plug="fresh", steps=1)
    monkeypatch.delattr(Prepared, "load_large")
    start({**raw, "resident": "all"}, root, only="couple")
    assert facts_of(root, "couple")["large_rows"] == 0


@pytest.mark.parametrize(
    ("couple", "optimizer"),
    [
        ({"mode": "standalone"}, "adafactor"),
        ({"mode": "standalone", "bridge": "freeze"}, "adamw"),
        ({"mode": "standalone", "optimizer": "adamw"}, "adamw"),
        ({"mode": "standalone", "steps": 0}, "adamw"),
        ({"mode": "ladder"}, "adamw"),
        ({"mode": "feedback"}, "adamw"),
        ({"mode": "feedback", "optimizer": "adafactor"}, "adafactor"),
    ],
)
def test_a_bridge_that_trains_alone_takes_the_optimizer_that_keeps_less(
    run_config: Callable[..., Raw], couple: Raw, optimizer: str
) -> None:
    config = resolve(parse_config(run_config(couple=couple), "x"))
    assert config.couple.optimizer == optimizer
    assert schedule_of(config.couple, 0, {}).optimizer == optimizer


def test_rows_that_a_start_is_fitted_on_count(couple: Couple) -> None:
    raw, root = couple(plug="ridge", align_samples=3, steps=1)
    start(raw, root, only="couple")
    assert facts_of(root, "couple")["large_rows"] == 3


def test_a_cache_changes_the_large_models_work_and_no_loss(couple: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    heights = Backbone.heights

    def counted(self: Backbone, batch: Batch) -> Any:
        read.append(len(batch.input_ids))
        return heights(self, batch)

    monkeypatch.setattr(Backbone, "heights", counted)
    found: dict[str, list[float]] = {}
    for cache in ("off", "memory", "disk"):
        raw, root = couple(mode="ladder", cache=cache, steps=12)
        read.clear()
        start(raw, root, only="couple")
        assert facts_of(root, "couple")["large_rows"] == sum(read), cache
        found[cache] = json.loads((root / "couple" / "losses.json").read_text())
    assert found["memory"] == pytest.approx(found["off"], rel=1e-4)
    assert found["disk"] == found["memory"]


@pytest.mark.parametrize("mode", ["standalone", "ladder"])
def test_of_the_bridge_its_own_weights_train_and_nothing_else(couple: Couple, mode: str) -> None:
    raw, root = couple(mode=mode, steps=1)
    start(raw, root, only="couple")
    assert facts_of(root, "couple")["trainable"]["bridge"] == facts_of(root, "prune")["bridge_parameters"]


def test_a_ladder_runs_in_half_precision(couple: Couple) -> None:
    raw, root = couple(dtype="bfloat16", mode="ladder", cache="disk", plug="fresh")
    assert start(raw, root)["evaluate"] == "running"
    assert facts_of(root, "evaluate")["bridge_coupled"]["n"] == 8


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "feedback"), ("t5", "feedback"), ("gpt2", "ladder_delta")])
def test_a_run_in_half_precision_trains_float32_tensors(couple: Couple, family: str, mode: str) -> None:
    raw, root = couple(family, dtype="bfloat16", mode=mode, plug="fresh")
    raw["repair"] = {"steps": 2, "batch_size": 4}
    assert start(raw, root)["evaluate"] == "running"
    assert {t.dtype for t in load_file(str(root / "couple" / "coupled.safetensors")).values()} == {torch.float32}
    assert any(_plugged(raw, root).values())
    assert facts_of(root, "evaluate")["large_plugged"]["n"] == 8


class Killed(BaseException):
    """Stands for a process that ends."""


def test_a_ladder_killed_and_resumed_ends_like_an_uninterrupted_one(
    couple: Couple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"mode": "ladder", "cache": "disk", "plug": "fresh", "layers": 0.5, "down": "learned"}
    raw, root = couple(**settings)
    replace, count = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal count
        count += target.name == "checkpoint.pt"
        if count == 2:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            start(raw, root, only="couple")
    before = torch.load(root / "couple" / "checkpoint.pt")
    assert before["cost"]["seconds"] > 0
    assert before["cost"]["peak_bytes"] > 0
    before["cost"] = {"seconds": 5000.0, "peak_bytes": 2**50, "reserved_bytes": 2**51}
    del before["seal"]
    before["seal"] = _seal(before)
    torch.save(before, root / "couple" / "checkpoint.pt")
    progress = Recorder()
    assert start(raw, root, progress=progress)["couple"] == "running"
    assert progress.began["couple (ladder)"] == 2
    done = json.loads((root / "couple" / "done.json").read_text())
    assert 5000 < done["seconds"] < 5500
    assert (done["peak_bytes"], done["reserved_bytes"]) == (2**50, 2**51)
    whole = tmp_path / "whole"
    start(raw, whole)  # every stage, so that torch's generator is elsewhere when coupling begins
    wanted = artefacts(whole)
    assert wanted["couple/done.json"]["facts"]["cache_bytes"] > 0
    assert artefacts(root) == wanted


def test_a_model_that_overflows_is_no_result(couple: Couple) -> None:
    raw, root = couple(mode="feedback", plug="fresh", steps=1, learning_rate=1e20)
    said = (
        "^evaluate large_plugged: an option's score is nan: every weight is finite, so it overflows in float32; "
        "if it was trained, try a lower learning rate$"
    )
    with pytest.raises(NotFinite, match=said):
        start(raw, root)
    assert not list(root.rglob("large_plugged*"))


def test_a_module_that_its_plug_makes_overflow_is_not_plugged(couple: Couple) -> None:
    raw, root = couple(steps=1, learning_rate=1e15, plug_learning_rate=1e30)
    said = r"^module and plug together overflow at decoder:0:attn.c_attn; try a lower couple.learning_rate"
    with pytest.raises(TrainingDiverged, match=said):
        start(raw, root)
    assert not (root / "plug" / "checkpoint").exists()


@pytest.mark.parametrize("mode", ["feedback", "standalone"])
def test_a_budget_counts_what_the_mode_uses_of_the_bridge(
    run_config: Callable[..., Raw], tmp_path: Path, mode: str
) -> None:
    raw = run_config("gpt2", "lora", couple={**PLAIN, "mode": mode}, prune={"budget": 0.3})
    for stage in ("tune", "score", "prune"):
        start(raw, tmp_path, only=stage)
    facts = facts_of(tmp_path, "prune")
    stored = dict(load_model(str(tmp_path / "prune" / "bridge")).named_parameters())
    vocabulary = {"transformer.wte.weight", "lm_head.weight"}
    counted = sum(t.numel() for name, t in stored.items() if mode == "standalone" or name not in vocabulary)
    assert facts["bridge_parameters"] == counted <= 0.3 * facts["large_parameters"]
    assert facts["bridge_share"] == counted / facts["large_parameters"]
    assert facts["bridge_model_parameters"] == sum(t.numel() for t in stored.values())


def test_fidelity_is_measured_at_the_start_now_and_then_and_at_the_end(
    couple: Couple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fidelity, "wrong", lambda *_: set())
    raw, root = couple(mode="feedback", plug="fresh", layer_map="uniform", steps=5, fidelity_rows=2, fidelity_every=2)
    start(raw, root, "couple")
    found = facts_of(root, "couple")["fidelity"]
    assert [each["step"] for each in found] == [0, 2, 4, 5]
    assert found == json.loads((root / "couple" / "fidelity.json").read_text(encoding="utf-8"))
    assert {len(each[way]["decoder"]) for each in found for way in ("bridge", "none")} == {3}
    assert facts_of(root, "couple")["still"] == []
    before = load_file(str(root / "couple" / "coupled.safetensors"))
    raw, other = couple(mode="feedback", plug="fresh", layer_map="uniform", steps=5, fidelity_rows=0)
    start(raw, other, "couple")
    assert facts_of(other, "couple")["fidelity"] == []
    after = load_file(str(other / "couple" / "coupled.safetensors"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_module_whose_fidelity_is_not_above_zero_stays_still_and_is_said_to(
    couple: Couple, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_three(_coupling: Coupling, _ways: WaysBack, _rows: object, step: int, _at_once: int) -> Fidelity:
        return Fidelity(step, {"decoder": [0.5, -0.1, 0.2]}, {"decoder": [0.1, 0.1, 0.1]})

    monkeypatch.setattr("plugbridge.stages.couple.fidelity", of_three)
    raw, root = couple(mode="feedback", plug="fresh", layer_map="uniform", layers=1, steps=3, checkpoint_every=1)
    with caplog.at_level(logging.WARNING):
        start(raw, root, "couple")
    assert "fidelity is not above 0 in these layers, whose modules stay as they start: decoder 1" in caplog.text
    assert facts_of(root, "couple")["still"] == [["decoder", 1]]
    moved: dict[int, float] = {}
    for name, tensor in load_file(str(root / "couple" / "coupled.safetensors")).items():
        if name.endswith("lora_B.weight"):
            layer = int(name.split(":")[1])
            moved[layer] = max(moved.get(layer, 0.0), float(tensor.abs().max()))
    assert moved[1] == 0 < min(moved[0], moved[2])
