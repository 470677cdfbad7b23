"""A plan says what a run takes and what would make it fit, without loading anything."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from plugbridge.config import parse_config
from plugbridge.plan import make_plan

Raw = dict[str, Any]


def test_every_stage_and_every_other_way_is_in_the_plan(run_config: Callable[..., Raw]) -> None:
    plan = make_plan(parse_config(run_config(repair={"steps": 3}, polish={"evaluations": 2}), "x"), 8, 2**40, 1)
    assert [stage.name for stage in plan.stages if stage.ours] == [
        "tune (small)", "score", "prune", "repair", "couple (feedback)", "polish", "evaluate (a batch)",
    ]  # fmt: skip
    assert [stage.name for stage in plan.stages if not stage.ours] == [
        f"large: {name}" for name in (
            "full fine-tuning", "LoRA", "LoRA, checkpointing", "LoRA, checkpointing, bf16",
            "QLoRA (4 bit, checkpointing, bf16)", "Ladder Side-Tuning",
        )
    ]  # fmt: skip
    assert all(stage.fits and stage.peak_bytes > 0 and stage.seconds > 0 for stage in plan.stages)
    assert plan.advice is None
    couple = next(stage for stage in plan.stages if stage.name == "couple (feedback)")
    assert (couple.passes, couple.large_rows) == (4, 16)
    json.dumps(plan.as_json())


def test_it_reads_configuration_files_only(run_config: Callable[..., Raw], tmp_path: Path) -> None:
    raw = run_config()
    for size in ("small", "large"):
        folder = tmp_path / size
        folder.mkdir()
        (folder / "config.json").write_bytes((Path(raw[size]) / "config.json").read_bytes())
        raw[size] = str(folder)
    assert make_plan(parse_config(raw, "x"), 8, None, 1).stages[0].fits is None


def test_advice_names_settings_that_fit(run_config: Callable[..., Raw]) -> None:
    config = parse_config(run_config(couple={"steps": 4, "batch_size": 64}), "x")
    plan = make_plan(config, 8, None, 1)
    peaks = {stage.name: stage.peak_bytes for stage in plan.stages if stage.ours}
    assert plan.peak.name == "couple (feedback)"
    others = max(peak for name, peak in peaks.items() if name != "couple (feedback)")
    assert make_plan(config, 8, others, 1).advice == "couple.batch_size: 1"
    assert make_plan(config, 8, 1000, 1).advice is None
    assert replace(plan, stages=plan.stages[:1]).peak.name == "tune (small)"
