"""What a run's markers refuse before any model is read is what is refused later, in the same words."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import save_model
from plugbridge.config import parse_config
from plugbridge.errors import RunError
from plugbridge.preflight import preflight
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import Stage, StageResult, check_kept, check_needs, execute, locked, stage_digests
from plugbridge.stages import recorded
from plugbridge.stages.build import build_stages
from plugbridge.stages.recorded import check_recorded

Raw = dict[str, Any]
TRAIN = {"steps": 4, "batch_size": 4}


def _stages(raw: Raw, root: Path, only: str | None = None) -> list[Stage]:
    return build_stages(prepare(parse_config(raw, "test"), None), root, Silent(), only)


def _do(raw: Raw, root: Path, redo: bool = False) -> None:
    """A run whose stages are done as their markers say; nothing is computed."""
    done = [replace(stage, work=lambda _folder: StageResult({}, 0.0, 0)) for stage in _stages(raw, root)]
    with locked(root):
        execute(root, done, None, lambda _stage, _what: None, redo=redo)


def _said(work: Callable[[], None]) -> str | None:
    try:
        work()
    except RunError as error:
        return str(error)
    return None


def _early(raw: Raw, root: Path, only: str | None = None) -> str | None:
    checked = preflight(parse_config(raw, "test"), None)
    return _said(lambda: check_recorded(root, checked, only, redo=False))


def _late(raw: Raw, root: Path, only: str | None = None) -> str | None:
    stages = _stages(raw, root, only)
    return _said(lambda: check_needs(root, stages, only)) or _said(lambda: check_kept(root, stages, only, redo=False))


def test_other_settings_are_refused_in_the_words_of_later(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    task, root = run_config()["task"], tmp_path / "run"
    raw = run_config(baselines={"small_ladder": TRAIN, "large_finetuned": TRAIN}, repair=TRAIN)
    raw["couple"]["plug"] = "random"  # which starts from what tune leaves
    _do(raw, root)
    assert _early(raw, root) is None
    other = save_model("gpt2", tmp_path / "other", hidden=16, layers=2, heads=4)
    changes: list[tuple[Raw, str | None]] = [
        ({"tune": {**TRAIN, "steps": 5}}, None),
        ({"tune": {**TRAIN, "steps": 5}}, "couple"),
        ({"tune": {**TRAIN, "micro_batch": 2}}, None),  # these models drop some of their numbers
        ({"couple": {**TRAIN, "mode": "standalone"}}, None),
        ({"method": {"name": "adapter"}}, None),
        ({"seed": 3, "dtype": "bfloat16"}, None),
        ({"large": str(other)}, None),
        ({"max_length": 16}, "prune"),
        ({"task": {**task, "prompt": "{word} is it :"}}, None),
        ({"baselines": {"small_ladder": {**TRAIN, "steps": 1}}}, None),
        ({"evaluate": {"limit": 3}}, "evaluate"),
        ({"polish": {"evaluations": 2}}, "polish"),
    ]
    for change, only in changes:
        early, late = _early({**raw, **change}, root, only), _late({**raw, **change}, root, only)
        assert early == late, change
        assert (early is None) == ("polish" in change)
    shutil.rmtree(root / "prune")
    for only in (None, "couple", "score", "no such"):
        assert _early(raw, root, only) == _late(raw, root, only)


def test_a_stage_that_may_be_back_is_not_refused_early(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    first, second, third = (run_config(tune={**TRAIN, "steps": steps}) for steps in (4, 5, 6))
    _do(first, tmp_path)
    _do(second, tmp_path, redo=True)
    assert _early(first, tmp_path) is _late(first, tmp_path) is None
    assert _early(third, tmp_path) == _late(third, tmp_path)
    assert "tune.steps 5 → 6" in str(_early(third, tmp_path))


def test_what_is_untold_is_taken_to_be_as_it_was(
    run_config: Callable[..., Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config(device="auto")
    _do(raw, tmp_path)
    monkeypatch.setattr(recorded, "surely_no_card", lambda: False)
    monkeypatch.setattr(recorded, "HASHED", 0)  # no file of a model is read
    assert _early(raw, tmp_path) is None
    assert "seed 0 → 1" in str(_early({**raw, "seed": 1}, tmp_path))
    shutil.rmtree(tmp_path / "score")
    score = next(stage for stage in _stages(raw, tmp_path) if stage.name == "score")
    depends, result = {**score.depends, "device": "cuda"}, StageResult({}, 0.0, 0)
    score = replace(score, depends=depends, work=lambda _folder: result)
    with locked(tmp_path):
        execute(tmp_path, [score], "score", lambda _stage, _what: None)
    assert _early({**raw, "seed": 1}, tmp_path) is None  # stages of two devices: nobody knows which it is today


def test_what_is_told_early_has_the_digests_of_later(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    for family, method, changes in (
        ("t5", "lora", {"method": {"name": "lora", "dropout": 0.1}, "couple": {**TRAIN, "mode": "standalone"}}),
        ("llama", "prefix", {"polish": {"evaluations": 2}, "tune": {**TRAIN, "micro_batch": 2}}),
    ):
        raw, root = {**run_config(family, method), **changes}, tmp_path / family
        _do(raw, root)
        parts = recorded.parts_told(preflight(parse_config(raw, "test"), None), None)
        told = recorded.stages_as_recorded(root, parts)
        assert stage_digests(told) == stage_digests(_stages(raw, root))
