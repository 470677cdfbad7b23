"""A sweep runs every combination, on validation rows, and names the best."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import test_cli
from plugbridge.bench.sweep import (
    Tried,
    apart,
    as_json,
    best_of,
    combinations,
    draw_sweep,
    foot,
    rivals,
    sweep_page,
    tried,
    verdict,
)  # fmt: skip
from plugbridge.cli.sweep import sweep_table
from plugbridge.errors import ConfigError
from plugbridge.markers import read_marker, write_marker
from plugbridge.report import TITLES
from test_cli import Call, mistake

call = test_cli.call  # fixtures
config = test_cli.config


def test_every_combination_is_run_once_on_validation_rows(
    call: Call, config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("sweep", config(), "--vary", "couple.learning_rate=0.001,0.1", "--vary", "couple.layers=0.5,1",
             "--set", "couple.steps=3", "--quiet")  # fmt: skip
    code, printed, _ = call(*words)
    assert code == 0
    root = tmp_path / "runs" / "sweep" / "toy"
    found = json.loads((root / "sweep.json").read_text())
    both = [(rate, layers) for rate in ("0.001", "0.1") for layers in ("0.5", "1")]
    assert [run["sets"] for run in found] == [
        [f"couple.learning_rate={rate}", f"couple.layers={layers}"] for rate, layers in both
    ]
    best = max(found, key=lambda run: run["values"]["large_plugged"])
    assert f"--set {best['sets'][0]} --set {best['sets'][1]}" in printed
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [rate, layers, f"{run['values']['large_plugged']:.3f}"] for (rate, layers), run in zip(both, found, strict=True)
    ]
    for run in root.iterdir():
        if run.is_dir():
            marker = json.loads((run / "evaluate" / "done.json").read_text())
            assert marker["depends"]["evaluate"]["split"] == "validation"
    tuned = {(run / "tune" / "done.json").read_text() for run in root.iterdir() if run.is_dir()}
    assert len(tuned) == 1  # shared
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/couple/done.json")}
    assert call(*words)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("*/couple/done.json")}
    assert all(run["commits"] == {} for run in found)
    done = next(root.glob("*/evaluate/done.json"))
    marker = read_marker(done.parent)
    assert marker is not None
    write_marker(done, {**marker, "depends": {**marker["depends"], "large": {"source": "a/b", "commit": "c" * 40}}})
    [run] = tried({done.parents[1].name: ("seed=1",)}, root, {})
    assert as_json([run])[0]["commits"] == {"large": "c" * 40}
    assert f"\nModels from the hub: large at {'c' * 12}.\n" in sweep_page([run], "large_plugged", "x")


def test_mistakes_are_said_before_anything_runs(call: Call, config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    vary = ("--vary", "seed=1,2")
    assert "is a file; a page needs a folder" in mistake(call("sweep", path, *vary, "--out", str(path)))
    assert "cannot write /proc/x: " in mistake(call("sweep", path, *vary, "--out", "/proc/x"))
    (tmp_path / "taken" / "seed=1").mkdir(parents=True)
    (tmp_path / "taken" / "seed=1" / "mine").touch()
    assert "is not empty and not a run" in mistake(call("sweep", path, *vary, "--out", str(tmp_path / "taken")))
    assert "expected key=value,value" in mistake(call("sweep", path, "--vary", "couple.steps"))
    assert "chosen on validation rows only" in mistake(call("sweep", path, "--vary", "evaluate.split=test"))
    assert "couple.nosuch" in mistake(call("sweep", path, "--vary", "couple.nosuch=1,2"))
    assert "keep one of the two" in mistake(
        call("sweep", path, "--vary", "couple.steps=1,2", "--set", "couple.steps=3")
    )
    assert "--by nobody" in mistake(call("sweep", path, "--vary", "couple.steps=1,2", "--by", "nobody"))
    assert not (tmp_path / "runs").exists()


def test_a_table_of_eighty_columns_cuts_nothing() -> None:
    values = dict.fromkeys(TITLES, 0.123) | {"large_plugged": 0.456}
    keys = ("couple.learning_rate", "couple.align_samples", "prune.reduction", "method.rank")
    sets = [tuple(f"{key}={i}.00{i}" for key in keys) for i in (1, 2, 3)]
    tried = [Tried(sets[0], values, "question_match", 600), Tried(sets[1], values, "question_match", 600)]
    failed = Tried(sets[2], {}, "", 0, "loss is nan")
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(sweep_table([*tried, failed], "large_plugged", tried[0]))
    lines = captured.get().splitlines()
    assert "…" not in captured.get()
    assert max(map(len, lines)) <= 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["1.001"] * 4 + ["0.456"], ["2.002"] * 4 + ["0.456"], ["3.003"] * 4 + ["failed"]]
    heads = [[cell.strip() for cell in line.strip("┃").split("┃")] for line in lines if line.startswith("┃")]
    found = ["".join(cells).replace(" ", "") for cells in zip(*heads, strict=True)]
    assert found == [*keys, "large,pluggedquestion_match"]


def _right(count: int, rows: int, first: int = 0) -> dict[str, tuple[bool, ...]]:
    """So many right answers, from a row on."""
    return {"large_plugged": tuple(first <= i < first + count for i in range(rows))}


def test_a_winner_is_named_only_where_the_rows_tell() -> None:
    def run(name: str, right: dict[str, tuple[bool, ...]]) -> Tried:
        answers = right["large_plugged"]
        return Tried((f"a.b={name}",), {"large_plugged": sum(answers) / 100}, "accuracy", 100, right=right)

    best, near, far = run("best", _right(60, 100)), run("near", _right(57, 100)), run("far", _right(40, 100))
    assert verdict([far, best], "large_plugged") == "best for large_plugged on 100 validation rows: --set a.b=best"
    assert rivals([near, best, far], best, "large_plugged") == [near]
    said = verdict([near, best, far], "large_plugged")
    assert said.startswith("highest for large_plugged on 100 validation rows: --set a.b=best; not clearly apart")
    assert said.endswith("answer by answer: a.b=near")
    assert "**" not in sweep_page([near, best, far], "large_plugged", "x")
    page = sweep_page(
        [Tried(("task.prompt={text} Topic:",), {"large_plugged": 0.1}, "accuracy", 9)], "large_plugged", ""
    )
    assert "Best for large_plugged on 9 validation rows: --set 'task.prompt={text} Topic:'." in page
    same = run("same", _right(60, 100, 10))
    tie = "2 runs are level and highest for large_plugged on 100 validation rows: --set a.b=best; --set a.b=same"
    assert verdict([best, same, far], "large_plugged") == tie
    assert (
        verdict([best, same, near], "large_plugged")
        == f"{tie}; not clearly apart from them, answer by answer: a.b=near"
    )
    unknown = Tried(("a.b=old",), {"large_plugged": 0.1}, "accuracy", 100)
    assert rivals([best, unknown], best, "large_plugged") == [unknown]
    assert verdict([Tried(("a.b=5",), {}, "", 0, "loss is nan")], "large_plugged") == ""


def test_the_more_runs_are_compared_the_more_a_winner_takes() -> None:
    def run(name: str, count: int) -> Tried:
        right = {"large_plugged": tuple(i < count for i in range(100))}
        return Tried((f"a.b={name}",), {"large_plugged": count / 100}, "accuracy", 100, right=right)

    best, next_best = run("best", 60), run("next", 52)  # better on eight rows, worse on none
    assert apart(*(each.right["large_plugged"] for each in (best, next_best)))[1] > 0
    assert rivals([best, next_best], best, "large_plugged") == []
    far = [run(f"far{i}", 20) for i in range(9)]
    assert rivals([best, next_best, *far], best, "large_plugged") == [next_best]
    assert foot([best, next_best]).endswith("than every other, at 95 %")
    said = "at 95 % for all 10 comparisons together (Bonferroni)"
    assert foot([best, next_best, *far, Tried(("a.b=x",), {}, "", 0, "loss is nan")]).endswith(said)
    assert f"{said}.\n" in sweep_page([best, next_best, *far], "large_plugged", "x")
    assert foot([best]) == ""
    # the half of z at alpha / 10, two-sided
    wide, narrow = (apart((True,) * 9, (False,) * 9, n) for n in (10, 1))
    assert (wide[2] - wide[1]) / (narrow[2] - narrow[1]) == pytest.approx(2.807034 / 1.959964, abs=1e-5)


def test_answers_are_compared_row_by_row() -> None:
    one, other = (True,) * 60 + (False,) * 40, (True,) * 50 + (False,) * 50
    value, low, high = apart(one, other)
    assert value == pytest.approx(0.1)
    assert 0 < low < value < high  # all ten that differ are for one side
    crossed = (False,) * 10 + (True,) * 60 + (False,) * 30  # ten rows each way: as many right, no difference
    value, low, high = apart(one, crossed)
    assert value == 0
    assert low == pytest.approx(-high)
    assert apart(one, one)[1] < 0 < apart(one, one)[2]


def test_a_sweep_s_picture_has_every_run(tmp_path: Path) -> None:
    runs = [Tried((f"a.b={i}",), {"large_plugged": i / 10}, "accuracy", 60, right=_right(6 * i, 60)) for i in (3, 4)]
    draw_sweep([*runs, Tried(("a.b=5",), {}, "", 0, "loss is nan")], "large_plugged", tmp_path / "s.png")
    assert matplotlib.image.imread(tmp_path / "s.png").std() > 0.05
    draw_sweep([Tried(("a.b=5",), {}, "", 0, "loss is nan")], "large_plugged", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_runs_that_are_level_have_dots_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("plugbridge.bench.sweep.save_picture", lambda figure, _path: drawn.append(figure))
    values = {"x": 0.375, "y": 0.375, "z": 0.1}
    runs = [Tried((f"a.b={name}",), {"large_plugged": value}, "accuracy", 24) for name, value in values.items()]
    draw_sweep(runs, "large_plugged", tmp_path / "s.png")
    dots = [line.get_markersize() for line in drawn[0].axes[0].lines if line.get_marker() == "o"]
    assert dots[0] == dots[1] > dots[2]


def test_a_page_has_the_best_in_bold_and_what_failed() -> None:
    good, better = (
        Tried((f"a.b={i}",), {"large_plugged": i / 10}, "accuracy", 600, right=_right(60 * i, 600)) for i in (3, 4)
    )
    failed = Tried(("a.b=5",), {}, "", 0, "loss is nan")
    page = sweep_page([good, better, failed], "large_plugged", "a command")
    assert "accuracy on 600 validation rows" in page
    assert "| 3 | 0.300 |" in page
    assert "| 4 | **0.400** |" in page
    assert "- a.b=5: loss is nan" in page
    assert best_of([good, better, failed], "large_plugged") is better
    assert best_of([failed], "large_plugged") is None
    with pytest.raises(ConfigError, match="the runs have large_plugged"):
        best_of([good], "small_tuned")


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("a.b=1, 2", ["1", " 2"]),
        ("task.words.c= music, song", [" music", " song"]),
        ("evaluate.models=[a],[a, b]", ["[a]", "[a, b]"]),
        ("task.prompt='a, {b}: ','{b}, a'", ["'a, {b}: '", "'{b}, a'"]),
        ("task.prompt=what's {a}?,it's :) {a}", ["what's {a}?", "it's :) {a}"]),
        ('polish={rows: 1},null', ["{rows: 1}", "null"]),
    ],
)  # fmt: skip
def test_values_are_as_written_and_a_comma_in_brackets_or_quotes_is_theirs(written: str, values: list[str]) -> None:
    key = written.partition("=")[0]
    assert list(combinations([written]).values()) == [(f"{key}={value}",) for value in values]


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        (["a.b=1,,2"], "a value between commas is empty"),
        (["a.b=1,2,"], "a value between commas is empty"),
        (["a.b=1,2,1"], "'1' stands twice"),
        (["a.b=[1,2"], "a bracket is not closed"),
        (["a.b='1,2"], "a quote is not closed"),
        (["a.b=1,2", "a.b=3"], "'a.b' is varied twice"),
        (["a\nb=1,2", "a\nb=3"], r"'a\\nb' is varied twice"),
        ([f"a.{key}=" + ",".join(map(str, range(20))) for key in "bcd"], "8,000 combinations; 1,000 are run at most"),
    ],
)
def test_what_cannot_be_varied_is_one_line(varied: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combinations(varied)


def test_two_combinations_never_share_a_folder_and_any_name_fits() -> None:
    found = combinations(["task.words.c= a b,a-b,a b", "task.label=" + "x" * 5000 + ",y"])
    assert len(found) == 6
    assert all(len(name) < 200 for name in found)
    assert list(combinations(["couple.steps=1,2", "couple.layers=0.5"])) == [
        "couple.steps=1_couple.layers=0.5", "couple.steps=2_couple.layers=0.5",
    ]  # fmt: skip
