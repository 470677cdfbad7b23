"""Whole runs with the large model on disk: the same run as with it in memory, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plugbridge.stages.couple as couple_stage
from plugbridge import prepare as preparing
from plugbridge.config import parse_config
from plugbridge.errors import ConfigError, ModelError, RunError
from plugbridge.models import load_model
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import execute, facts_of
from plugbridge.stages.build import build_stages
from plugbridge.stages.room import cache_room, couple_room, score_room
from plugbridge.transfer.cache import ActivationCache, make_cache
from test_durability import start

Raw = dict[str, Any]
TRAIN = {"steps": 3, "batch_size": 4}
MEMORY = {"samples": 6, "keep": "memory"}


def _tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run left, by file and name."""
    return {
        f"{path.relative_to(root)}:{name}": tensor
        for path in sorted(root.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("gpt2", "lora", {"couple": {**TRAIN, "mode": "feedback"}, "polish": {"evaluations": 2, "rows": 4}}),
        ("t5", "adapter", {"couple": {**TRAIN, "mode": "feedback"}, "repair": TRAIN, "score": MEMORY}),
        ("llama", "prefix", {"couple": {**TRAIN, "mode": "ladder", "cache": "disk"}}),
        (
            "t5-gated",
            "lora",
            {"couple": {**TRAIN, "mode": "ladder_delta"}, "score": {"importance": "activation", **MEMORY}},
        ),
        ("gpt2", "lora", {"couple": {**TRAIN, "mode": "standalone", "plug": "ridge", "layer_map": "cka"}}),
        ("gpt2", "adapter", {"baselines": {"large_ladder": TRAIN}}),
        ("llama", "adapter", {"couple": {**TRAIN, "mode": "backprop"}, "ceiling": {**TRAIN, "micro_batch": 3}}),
    ],
)
def test_a_streamed_run_is_the_resident_run(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, method: str, changes: Raw,
) -> None:  # fmt: skip
    defaults = {"tune": TRAIN, "ceiling": None, "evaluate": {"limit": 8, "probe": True}}
    raw = run_config(family, method, **{**defaults, **changes})
    start({**raw, "resident": "all"}, tmp_path / "all")
    loaded: list[str] = []

    def counted(source: str, **options: Any) -> Any:
        loaded.append(source)
        return load_model(source, **options)

    monkeypatch.setattr(preparing, "load_model", counted)
    start({**raw, "resident": "none"}, tmp_path / "none")
    assert loaded[2:].count(raw["large"]) == 0  # after names and shapes are checked
    wanted, found = _tensors(tmp_path / "all"), _tensors(tmp_path / "none")
    assert wanted.keys() == found.keys() != set()
    apart: dict[str, list[torch.Tensor]] = {}
    for name, tensor in wanted.items():
        pair = torch.stack([found[name].float() - tensor.float(), tensor.float()]).reshape(2, -1)
        if name.split("/")[0] in ("tune", "score", "prune"):
            assert float(pair[0].abs().max()) <= 2e-4 * float(pair[1].abs().max()), name
        apart.setdefault(name.partition(":")[0], []).append(pair)
    for file, pairs in apart.items():
        # AdamW's first steps have the rate's size however small a gradient is: rounding, which depends on the processor
        # where matrices begin at odd addresses, turns some of them round; a weight that was missed would change most
        difference, whole = torch.cat(pairs, 1).norm(dim=1)
        assert float(difference) <= 0.05 * float(whole), file
    for path in (tmp_path / "all").glob("*/losses.json"):  # the first of every training is before any such step
        first = [
            json.loads((root / path.parent.name / path.name).read_text())[0]
            for root in (path.parents[1], tmp_path / "none")
        ]
        assert first[1] == pytest.approx(first[0], rel=1e-5), path.parent.name
    again = start({**raw, "resident": "none"}, tmp_path / "all")
    assert set(again.values()) == {"skipped"}


def test_a_large_model_that_fits_is_in_memory_and_one_that_does_not_is_streamed(
    run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(run_config(), "test")
    assert prepare(config, None).streamed is None
    need = sum(p.numel() * 4 for p in load_model(config.large_path).parameters())
    for free, streams in ((2 * need, False), (2 * need - 1, True)):
        monkeypatch.setattr(preparing, "free_memory", lambda _device, free=free: free)
        assert (prepare(config, None).streamed is not None) == streams
    half = config.model_copy(update={"dtype": "bfloat16"})
    assert prepare(half, None).streamed is None
    assert prepare(config.model_copy(update={"resident": "all"}), None).streamed is None


def test_weights_that_cannot_be_streamed(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config()
    model = load_model(raw["large"])
    for file in Path(raw["large"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    raw["large"] = str(tmp_path)
    with pytest.raises(ModelError, match=r"has no safetensors weights to stream; convert them with save_pretrained"):
        prepare(parse_config({**raw, "resident": "none"}, "test"), None)
    monkeypatch.setattr(preparing, "free_memory", lambda _device: 0)
    assert prepare(parse_config(raw, "test"), None).streamed is None


def test_quantised_weights_are_not_streamed(run_config: Callable[..., Raw]) -> None:
    raw = run_config(resident="none")
    raw["large"] = {"path": raw["large"], "load_in": "8bit"}
    with pytest.raises(ConfigError, match="'8bit' keeps quantised weights on the device; use one of the two"):
        prepare(parse_config(raw, "test"), None)


@pytest.mark.parametrize(("resident", "size"), [("none", "large"), ("all", "large"), ("all", "small")])
def test_a_model_that_changes_between_two_stages_is_noticed(
    run_config: Callable[..., Raw], tmp_path: Path, resident: str, size: str
) -> None:
    raw = run_config(resident=resident, ceiling=None, couple={"steps": 2, "plug": "ridge", "mode": "standalone"})
    own = tmp_path / size
    shutil.copytree(raw[size], own)
    stages = build_stages(prepare(parse_config({**raw, size: str(own)}, "test"), None), tmp_path / "run", Silent())
    said: dict[str, str] = {}

    def announce(stage: str, what: str) -> None:
        said[stage] = what
        if stage == "couple":
            os.utime(own / "model.safetensors", ns=(0, 0))

    with pytest.raises(ModelError, match=r"model\.safetensors has changed while the run was going on"):
        execute(tmp_path / "run", stages, None, announce)
    assert list(said) == ["tune", "score", "prune", "couple"]


def test_a_model_that_changes_under_a_training_ends_it(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config(resident="all", ceiling=None, tune={"steps": 50, "batch_size": 2})
    raw["small"] = str(shutil.copytree(raw["small"], tmp_path / "small"))
    steps: list[int] = []

    class Changing(Silent):
        @contextmanager
        def bar(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
            def advance(count: int, note: str = "") -> None:
                steps.append(count)
                os.utime(tmp_path / "small" / "model.safetensors", ns=(0, 0))

            yield advance

    monkeypatch.setattr("plugbridge.stages.work.WATCH", 0.0)
    stages = build_stages(prepare(parse_config(raw, "test"), None), tmp_path / "run", Changing())
    with pytest.raises(ModelError, match=r"model\.safetensors has changed while the run was going on"):
        execute(tmp_path / "run", stages, "tune", lambda _stage, _what: None)
    assert steps == [1]


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    [("gpt2", "ladder", "float32"), ("t5", "ladder", "bfloat16"), ("t5", "ladder_delta", "float32")],
)
def test_too_little_disk_for_the_cache_is_said_before_the_run(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mode: str, dtype: str
) -> None:
    couple = {"steps": 12, "batch_size": 3, "mode": mode, "cache": "disk"}
    raw = run_config(family, ceiling=None, tune=TRAIN, couple=couple, dtype=dtype, evaluate={"limit": 4})
    prepared = prepare(parse_config(raw, "test"), None)
    cached, need = cache_room(prepared), couple_room(prepared)  # where the Bridge trains, it is written as well
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=need - 1))
    with pytest.raises(RunError, match=r"stage 'couple' will write \d+\.\d MB to .* have less there"):
        start(raw, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "run.json"}
    monkeypatch.undo()
    kept: list[ActivationCache | None] = []
    monkeypatch.setattr(couple_stage, "make_cache", lambda *of: kept.append(make_cache(*of)) or kept[-1])
    start(raw, tmp_path / "run")
    assert [cache.bytes for cache in kept if cache is not None] == [cached]
    assert facts_of(tmp_path / "run", "couple")["cache_bytes"] == cached
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    assert set(start(raw, tmp_path / "run").values()) == {"skipped"}
    assert cache_room(prepare(parse_config({**raw, "couple": {**couple, "cache": "memory"}}, "test"), None)) == 0


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float32"), ("t5", "bfloat16"), ("llama", "float32")])
def test_too_little_disk_for_the_kept_states_is_said_before_the_run(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    couple = {**TRAIN, "mode": "standalone"}
    raw = run_config(
        family, ceiling=None, tune=TRAIN, couple=couple, dtype=dtype, score={"samples": 6}, resident="none",
        baselines={"large_ladder": TRAIN},
    )  # fmt: skip
    prepared = prepare(parse_config(raw, "test"), None)
    need = score_room(prepared)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=need - 1))
    with pytest.raises(RunError, match=r"stage 'score' will write \d+\.\d MB to .* have less there"):
        start(raw, tmp_path / "run")
    monkeypatch.undo()
    stages = {stage.name: stage for stage in build_stages(prepared, tmp_path / "run", Silent())}
    assert stages["large_ladder"].room() == need
    stage = stages["score"]
    execute(tmp_path / "run", [stage], None, lambda _stage, _what: None)
    assert 0.5 * need < facts_of(tmp_path / "run", "score")["kept_bytes"] <= need
    assert score_room(prepare(parse_config({**raw, "resident": "all"}, "test"), None)) == 0
