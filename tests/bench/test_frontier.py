"""The frontier: ways, their cells and steps put together, from the shipped file and on tiny shapes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from plugbridge.bench.frontier import points_of, steps_of
from plugbridge.bench.frontier_page import draw_frontier, frontier_page
from plugbridge.bench.memory import Count, rows_of
from plugbridge.bench.quality import REFERENCES, Cell
from plugbridge.bench.ways import groups_of_ways, load_frontier
from plugbridge.cli import main
from plugbridge.errors import ConfigError
from plugbridge.memory.case import Case
from plugbridge.memory.predict import Trace, predict
from plugbridge.memory.rows import coupled, few_bits
from plugbridge.memory.shapes import find_shapes, gpt2

CONFIGS = Path(__file__).parents[2] / "configs"


def _written(folder: Path, **changes: Any) -> Path:
    raw = yaml.safe_load((CONFIGS / "frontier.yaml").read_text())
    names = ("LoRA, checkpointing", "feedback, 3 bits", "MeZO, 20 times the steps")
    raw["ways"] = {name: raw["ways"][name] for name in names}
    path = folder / "frontier.yaml"
    path.write_text(yaml.safe_dump({**raw, "grid": str(CONFIGS / "quality_bits.yaml"), **changes}, sort_keys=False))
    return path


def test_every_shipped_way_has_a_step_and_a_cell() -> None:
    frontier, grid, grid_file = load_frontier(CONFIGS / "frontier.yaml")
    for shape in find_shapes("paper"):
        assert len(steps_of(frontier, rows_of(shape, "cpu"))) <= len(frontier.ways)
    known = {name for group in groups_of_ways(frontier, grid, grid_file) for name, _ in group.variants}
    assert {way.cell for way in frontier.ways.values()} <= known | set(REFERENCES.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ways": {"a": {"cell": "x", "step": "y", "beside": "b"}}}, "'a' stands beside 'b', no way of it; known: a"),
        ({"ways": {}}, "ways"),
        ({"task": "trec", "method": "prefix"}, "has no runs of 'prefix' on 'trec'"),
        ({"ways": {"a": {"cell": "x", "step": "y"}}}, "no step 'y' is counted; known: full fine-tuning: train; "),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    def read(path: Path) -> None:
        frontier, grid, grid_file = load_frontier(path)
        groups_of_ways(frontier, grid, grid_file)
        steps_of(frontier, rows_of(find_shapes("small")[0], "cpu"))

    path = _written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        read(path)


def _count(model: str, name: str, peak: int, weights: int, seconds: float, measured: bool = True) -> Count:
    method, stage = name.rsplit(": ", 1)
    return Count(model, 1, 8, method, stage, peak, peak, seconds, measured, 0.0, "", weight_bytes=weights)


def _cell(family: str, variant: str, pgr: float) -> Cell:
    return Cell(
        family, "lora", "feedback", None, None, None, "wordnet-kind", [0, 1], "accuracy", 0.5, 0.4, 0.6, pgr, pgr - 0.1,
        pgr + 0.2, None, "", variant, 10, 0.1, None, None, None,
    )  # fmt: skip


def test_points_join_cells_and_steps_of_one_kind_and_compare_them(tmp_path: Path) -> None:
    frontier, grid, grid_file = load_frontier(_written(tmp_path))
    groups = groups_of_ways(frontier, grid, grid_file)
    lora, feedback, mezo = (way.step for way in frontier.ways.values())
    counts = [_count("GPT2-XL", lora, 100, 40, 2.0), _count("GPT2-XL", feedback, 150, 20, 1.0)]
    counts += [_count("GPT2-XL", mezo, 50, 30, 3.0, measured=False), _count("T5-3B", lora, 7, 6, 5.0)]
    cells = [_cell("gpt2", "large tuned", 1.0), _cell("gpt2", "feedback, 3 bits", 0.9), _cell("t5", "MeZO", 0.3)]
    points = {(p.family, p.way): p for p in points_of(frontier, groups, cells, counts, "made")}
    assert len(points) == 4
    first, second, third = (points["gpt2", name] for name in frontier.ways)
    assert (first.pgr, first.low, first.high, first.peak_ratio) == (1.0, 0.9, 1.2, None)
    assert (second.pgr, second.peak_ratio, second.weight_ratio, second.seconds_ratio) == (0.9, 1.5, 0.5, 0.5)
    assert (third.pgr, third.weight_bytes, third.seconds) == (None, 600, 60.0)
    assert (third.weight_ratio, third.seconds_ratio) == (15.0, None)  # predicted beside measured
    assert points["t5", "LoRA, checkpointing"].model == "T5-3B"
    page = frontier_page(list(points.values()), "made")
    assert (
        "| feedback, 3 bits | +0.90 <sub>+0.80 to +1.10</sub> | 0 | 1.50 | 0 | 0.50 | 1.0 | 0.50 | measured |" in page
    )
    assert "## t5, lora on wordnet-kind; steps on T5-3B, 1 x 8 tokens" in page
    draw_frontier(list(points.values()), tmp_path / "f.png")
    draw_frontier([], tmp_path / "none.png")
    assert (tmp_path / "f.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 1000


def test_the_command_predicts_what_it_is_not_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "frontier", str(_written(tmp_path)), "--shapes", "small", "--batch", "1", "--summary", "-q"]
    monkeypatch.setattr(sys, "argv", ["plugbridge", *words, "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "6 ways in" in capfd.readouterr().out
    rows = json.loads((tmp_path / "runs" / "frontier.json").read_text())
    assert [row["way"] for row in rows[:3]] == list(yaml.safe_load((tmp_path / "frontier.yaml").read_text())["ways"])
    assert {(row["measured"], row["pgr"], row["batch"]) for row in rows} == {(False, None, 1)}
    assert rows[1]["weight_ratio"] < 0.75 < rows[0]["weight_bytes"] / 2**20
    assert 10 < rows[2]["weight_ratio"] < 20  # two forward passes for a forward, another and a backward one


def _trace(mode: str, streamed: bool, bits: int | None = None) -> Trace:
    config = gpt2(64, 6, 4, 96, 64)
    case = Case(config, 2, 16, streamed=streamed)
    small = gpt2(32, 2, 4, 96, 64)
    row = coupled(case, small, mode) if bits is None else few_bits(case, small, mode, bits)  # pyright: ignore[reportArgumentType]
    return predict(replace(row.case, trained={}), row.make)


def test_weights_are_counted_as_often_as_a_step_reads_them() -> None:
    blocks = 6 * (12 * 64 * 64 + 13 * 64) * 4  # matrices, biases and norms, in bytes
    head = 96 * 64 * 4
    exact, forward, feedback = (_trace(mode, False) for mode in ("backprop", "mezo", "identity"))
    module = 4 * forward.trained
    assert 2 * (blocks + head) <= forward.used < 2 * (blocks + head) + 10 * module  # two passes, each reads all once
    assert 3 * blocks < exact.used < 3 * (blocks + head) + 20 * module  # forward, again for its gradients, and back
    assert blocks < feedback.used < 2 * (blocks + head) + 20 * module
    streamed = _trace("backprop", True), _trace("feedback", True, 3)
    assert streamed[0].read == pytest.approx(2 * blocks, rel=0.1)  # and a block read ahead
    assert streamed[1].read == pytest.approx(blocks, rel=0.2)
    packed = 6 * 12 * 64 * 64 * 3.125 / 8  # each once
    assert packed < streamed[1].used < packed + 4 * head + 20 * module
