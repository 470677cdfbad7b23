"""Every shipped configuration runs (shortened), and the documents say what the code says."""

import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import data_directory
from plugbridge import cli
from plugbridge.config import fields_markdown, load_config
from plugbridge.report import read_report
from plugbridge.tasks.describe import tasks_markdown
from plugbridge.tasks.rows import Row, load_rows
from plugbridge.tasks.spec import Split, load_task, task_names
from plugbridge.tuners.table import METHODS

ROOT = Path(__file__).parent.parent
GRIDS = {
    "frontier",
    "quality",
    "quality_bits",
    "quality_r4",
    "quality_gpu",
    "standalone_study",
    "optimizers",
}  # not a run: tests/bench has it
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in GRIDS)
SHORT = (
    "tune.steps=2", "couple.steps=2", "ceiling.steps=2", "score.samples=2", "evaluate.limit=8",
    "tune.batch_size=4", "couple.batch_size=4", "ceiling.batch_size=4", "evaluate.split=validation",
)  # fmt: skip


def test_there_is_a_config_for_every_method_on_both_families() -> None:
    names = {path.stem for path in CONFIGS}
    assert {f"{f}-{m}" for f in ("gpt2", "t5") for m in ("lora", "adapter", "prefix")} | {"demo"} <= names


def few_rows(*given: Any) -> dict[Split, list[Row]]:
    """The first rows of each split: reading all of them takes longer than such a run."""
    return {split: rows[:40] for split, rows in load_rows(*given).items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugbridge.preflight.load_rows", few_rows)
    if load_config(path).task == "rte":
        monkeypatch.setenv("PLUGBRIDGE_DATA", str(data_directory()))
    arguments = ["plugbridge", "run", str(path), "--quiet", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*arguments, *(part for s in SHORT for part in ("--set", s))])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    report = read_report(tmp_path / "run")
    assert [row["name"] for row in report["rows"]][-1] == "large_tuned"
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_documented_tasks_are_the_task_files() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert page.endswith(tasks_markdown([load_task(name) for name in task_names()]))


def test_the_documented_configuration_is_the_schema() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").endswith(fields_markdown())


def test_an_override_changes_one_place_of_what_the_file_says_twice(tmp_path: Path) -> None:
    text = "small: a\nlarge: b\ntask: rte\ntune: &train {steps: 3}\ncouple: *train\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load_config(tmp_path / "run.yaml", ("couple.steps=4", "couple.mode=ladder"))
    assert (config.tune.steps, config.couple.steps, config.couple.mode) == (3, 4, "ladder")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*-prefix.yaml")), ids=lambda path: path.stem)
def test_prefix_is_tuned_at_its_own_rate(path: Path) -> None:
    """A lower one left the small GPT-2 at the majority."""
    config = load_config(path)
    assert config.ceiling is not None
    for settings in (config.tune, config.couple, config.ceiling):
        assert settings.learning_rate == METHODS["prefix"].learning_rate == 0.1
