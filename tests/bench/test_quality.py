"""A grid from end to end on tiny models, and the intervals against what is known of them."""

import contextlib
import io
import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from conftest import VOCAB, WORDS, save_model, toy_rows, write_jsonl
from plugbridge.bench import quality
from plugbridge.bench.grid import Group, groups_of, load_grid
from plugbridge.bench.present import page
from plugbridge.bench.quality import answers, cells_of, difference, intervals, left_out, run_groups, slug
from plugbridge.cli import main
from plugbridge.config import load_config
from plugbridge.errors import RunError
from plugbridge.markers import read_marker, write_marker
from plugbridge.progress import Silent

Rows = list[NDArray[np.float64]]

# intervals


def _pattern(*shares: float, n: int = 200) -> Rows:
    """A seed's answers for each share: the first ones right."""
    return [(np.arange(n) < share * n).astype(float) for share in shares]


def _random(*shares: float, n: int = 200, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return [(generator.random(n) < share).astype(float) for share in shares]


def test_value_and_pgr_are_of_the_means() -> None:
    value, _, _, pgr, _, _ = intervals(_pattern(0.5, 0.6), _pattern(0.2, 0.4), _pattern(0.8, 0.9))
    assert value == pytest.approx(0.55, abs=1e-12)
    assert pgr == pytest.approx((0.55 - 0.3) / (0.85 - 0.3), abs=1e-12)  # 0.4545; the mean of PGRs would be 0.45
    value, _, _, pgr, _, _ = intervals(_pattern(0.1), _pattern(0.5), _pattern(0.9))
    assert (value, pgr) == (pytest.approx(0.1), pytest.approx(-1.0))


def test_an_interval_has_no_width_where_nothing_can_differ() -> None:
    none, every, half = _pattern(0, 0), _pattern(1, 1), _random(0.5, 0.5)
    assert intervals(every, none, every) == (1, 1, 1, 1, 1, 1)
    assert intervals(none, none, every) == (0, 0, 0, 0, 0, 0)
    # paired: a model that answers as small or as large does has no doubt in its PGR, whatever the rows and seeds
    large = _random(0.9, 0.8, seed=1)
    for model, pgr in ((half, 0.0), (large, 1.0)):
        value, low, high, *found = intervals(model, half, large)
        assert low < value < high
        assert found == [pgr] * 3


def test_seeds_that_differ_widen_the_interval() -> None:
    assert intervals(_pattern(0, 1), _pattern(0, 0), _pattern(1, 1)) == (0.5, 0.0, 1.0, 0.5, 0.0, 1.0)
    low, high = intervals(_pattern(0.5, 0.5), _pattern(0, 0), _pattern(1, 1))[1:3]
    assert (low, high) != (0.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_holds_its_value(seed: int) -> None:
    right, small, large = (_random(p, p + 0.02, p - 0.02, seed=10 * seed + i) for i, p in enumerate((0.6, 0.4, 0.8)))
    value, low, high, pgr, pgr_low, pgr_high = intervals(right, small, large)
    assert 0 <= low < value < high <= 1
    assert pgr is not None
    assert pgr_low is not None
    assert pgr_high is not None
    assert pgr_low < pgr < pgr_high


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (_random(0.5, 0.5), _random(0.5, 0.5)),  # the same
        (_random(0.8, 0.7), _random(0.6, 0.5, seed=1)),  # small is better
        (_pattern(0.5, n=10), _pattern(0.6, n=10)),  # one row of ten
        (_random(0.5, 0.6), _random(0.55, 0.6, seed=1)),
        (_pattern(0.5, 0.5), _pattern(1.0, 0.25)),  # large is better by one seed of two
    ],
)
def test_there_is_no_pgr_without_a_gap(small: Rows, large: Rows) -> None:
    right = [np.ones_like(side) for side in small]
    assert intervals(right, small, large) == (1, 1, 1, None, None, None)


def test_intervals_are_the_same_every_time() -> None:
    sides = [_random(p, p, seed=i) for i, p in enumerate((0.6, 0.4, 0.8))]
    np.random.seed(1)
    first = intervals(*sides)
    np.random.seed(2)
    assert intervals(*sides) == first


@pytest.mark.parametrize(("share", "n"), [(0.2, 150), (0.5, 300), (0.9, 600)])
def test_one_seeds_interval_is_as_wide_as_the_binomials(share: float, n: int) -> None:
    (right,) = _random(share, n=n)
    for seeds in (1, 3):  # the same answers thrice are no more rows
        value, low, high, *_ = intervals(*[[right] * seeds] * 3)
        wanted = 2 * 1.959964 * (value * (1 - value) / n) ** 0.5
        assert 0.85 < (high - low) / wanted < 1.15


def test_intervals_cover_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds on rows some of which are hard for all: the truth is the mean over rows and seeds to come."""
    monkeypatch.setattr(quality, "RESAMPLES", 200)
    held = 0
    for trial in range(100):
        generator = np.random.default_rng(trial)
        ease = generator.beta(0.5, 0.25, size=150)  # mean 2/3
        right = [(generator.random(150) < ease).astype(float) for _ in range(3)]
        _, low, high, *_ = intervals(right, right, right)
        held += low <= 2 / 3 <= high
    assert held >= 93


def test_intervals_of_seeds_that_differ_cover_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many draws as seeds would hold the truth in 182 of 200."""
    monkeypatch.setattr(quality, "RESAMPLES", 200)
    held = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        ease = generator.beta(0.5, 0.5, size=600)
        right = [(generator.random(600) < ease + generator.normal(0, 0.03)).astype(float) for _ in range(3)]
        _, low, high, *_ = intervals(right, right, right)
        held += low <= 0.5 <= high
    assert held >= 185


def test_a_difference_is_of_the_same_rows_and_seeds() -> None:
    small, large = _random(0.2, 0.3), _random(0.8, 0.9, seed=1)
    right = _random(0.5, 0.6, seed=2)
    better = [np.where(np.arange(200) < 20, 1.0, side) for side in right]  # the same, and 20 rows right
    found = difference(better, right, small, large)
    assert found is not None
    value, low, high = found
    gap = np.mean(large) - np.mean(small)
    assert value == pytest.approx((np.mean(better) - np.mean(right)) / gap)
    assert 0 < low < value < high
    assert intervals(better, small, large)[4] < intervals(right, small, large)[5]  # which overlap
    assert difference(right, right, small, large) == (0, 0, 0)
    assert difference(right, better, large, small) is None
    assert difference(right, better, small, large)[0] == -value


# a scheduler of groups


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process: nothing to start, and what is replaced here is replaced there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(quality, "workers", lambda count, **_ready: ThreadPoolExecutor(count))


def _groups(count: int) -> list[Group]:
    return [Group("tiny", "lora", "rte", seed, ()) for seed in range(count)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("jobs", [1, 3])
def test_groups_run_in_order_and_not_too_many_at_a_time(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    began: list[int] = []
    running, most = set(), 0
    gate = threading.Barrier(jobs)

    def run(group: Group, data: Path | None, out: Path, grid: Path | None) -> str:
        nonlocal most
        assert (data, out, grid) == (Path("data"), Path("out"), None)
        began.append(group.seed)
        running.add(group.seed)
        most = max(most, len(running))
        gate.wait(timeout=60)  # nobody ends before `jobs` are at work
        running.remove(group.seed)
        return group.name

    monkeypatch.setattr(quality, "run_group", run)
    run_groups(_groups(6), Path("data"), Path("out"), jobs, Silent())
    assert sorted(began) == list(range(6))
    assert most == jobs
    if jobs == 1:
        assert began == list(range(6))


@pytest.mark.usefixtures("threads")
def test_the_first_error_stops_the_grid_after_the_runs_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = [], []
    failed = threading.Event()

    def run(group: Group, _data: Path | None, _out: Path, _grid: Path | None) -> str:
        began.append(group.seed)
        if group.seed == 1:
            failed.set()
            raise RunError("no space left")
        if group.seed == 2:
            assert failed.wait(timeout=60)
            time.sleep(0.1)
        ended.append(group.seed)
        return group.name

    monkeypatch.setattr(quality, "run_group", run)
    with pytest.raises(RunError, match="no space left"):
        run_groups(_groups(9), None, Path("out"), 2, Silent())
    assert set(began) <= {0, 1, 2, 3}
    assert sorted(ended) == [seed for seed in sorted(began) if seed != 1]


# from end to end

KEYS = {
    "family", "method", "mode", "bridge_share", "down", "start", "task", "seeds", "metric", "value", "low", "high",
    "pgr", "pgr_low", "pgr_high", "control", "command",
    "variant", "n", "majority", "large_rows", "seconds", "peak_bytes", "differences", "split",
    "commits", "bits", "bridge_bytes_share",
}  # fmt: skip
STEPS = {
    f"{stage}.{key}": value
    for stage in ("tune", "couple", "ceiling")
    for key, value in (("steps", 2), ("batch_size", 8))
}
REFERENCES = ["small tuned", "large zero-shot", "linear probe", "large tuned"]


@dataclass(frozen=True)
class Done:
    """A finished grid: its file, its output directory, and what the command said."""

    grid: Path
    out: Path
    said: tuple[int, str, str] = (0, "", "")

    @property
    def words(self) -> tuple[Any, ...]:
        """The command that made it."""
        return (self.grid, "--out", self.out, "--data", self.grid.parent / "data", "--jobs", 1, "--quiet")

    def root(self, seed: int, variant: str) -> Path:
        return self.out / f"tiny-lora-rte-s{seed}" / slug(variant)

    def cells(self) -> dict[str, dict[str, Any]]:
        cells = json.loads((self.out / "quality.json").read_text(encoding="utf-8"))
        assert len({cell["variant"] for cell in cells}) == len(cells)
        return {cell["variant"]: cell for cell in cells}


def call(*words: Any) -> tuple[int, str, str]:
    """Run one command; returns exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plugbridge", "bench", "quality", *map(str, words)])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("PLUGBRIDGE_DATA", raising=False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0), out.getvalue(), err.getvalue()


def stamps(root: Path) -> dict[str, int]:
    """When every file was written; a run's own configuration is written at every start."""
    skipped = {".lock", "config.yaml"}
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name not in skipped}


def _write_rte(folder: Path) -> None:
    """RTE's files with rows in a tiny model's words: a premise of an even number entails anything."""
    folder.mkdir(parents=True)
    for split, seed, count in (("train", 1, 80), ("val", 2, 60)):
        rows = [
            {"premise": row["word"], "hypothesis": f"{row['before']} {WORDS[i // 8]}", "label": row["label"]}
            for i, row in enumerate(toy_rows(count, seed))  # no two ask the same
        ]
        for i, row in enumerate(rows):
            row["idx"] = str(i)
            row["label"] = "entailment" if row["label"] == "even" else "not_entailment"
        write_jsonl(folder / f"{split}.jsonl", rows)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two variants on two seeds, run by the command in a process of its own."""
    root = tmp_path_factory.mktemp("grid")
    _write_rte(root / "data" / "RTE")
    words = [{"yes": "True", "no": "False"}.get(word, word) for word in VOCAB]
    save_model("gpt2", root / "small", words, hidden=8, layers=1, heads=2, seed=1)
    save_model("gpt2", root / "large", words, hidden=16, layers=2, heads=4, seed=2)
    grid = {
        "pairs": {"tiny": {"small": "small", "large": "large"}},
        "seeds": [0, 1],
        "base": {
            **STEPS, "score.samples": 4, "prune.reduction": 2, "method.rank": 2, "device": "cpu",
            "evaluate.probe": True,
        },
        "variants": {
            "stands alone": {"set": {"couple.mode": "standalone", "couple.plug": "random"}},
            "no Bridge": {"control": True, "set": {"couple.mode": "identity", "couple.plug": "random"}},
        },
        "compare": ["no Bridge"],
        "default": [
            {"pairs": ["tiny"], "methods": ["lora"], "tasks": ["rte"], "variants": ["stands alone", "no Bridge"]}
        ],
    }  # fmt: skip
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    finished = Done(path, root / "out")
    return replace(finished, said=call(*finished.words))


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Done:
    """The finished grid once more, to be spoilt."""
    shutil.copytree(done.out, tmp_path / "out")
    return Done(done.grid, tmp_path / "out")


def test_the_command_writes_a_table_its_data_and_a_picture(done: Done) -> None:
    assert done.said == (0, f"7 cells in {done.out / 'quality.md'}, quality.json, quality.png\n", "")
    cells = done.cells()
    variants = ["stands alone", "stands alone, the Bridge itself", "no Bridge"]
    assert list(cells) == [*REFERENCES, *variants]
    for cell in cells.values():
        assert set(cell) == KEYS
        same = ("family", "method", "task", "seeds", "metric", "n", "command")
        command = f"plugbridge bench quality {done.grid} --data DIR --only tiny-lora-rte-s"
        wanted = ["tiny", "lora", "rte", [0, 1], "accuracy", 60, command]
        assert [cell[key] for key in same] == wanted
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
        assert cell["split"] == "test"
    assert [cell["control"] for cell in cells.values()] == [*REFERENCES, None, variants[1], "no Bridge"]
    ways = {name: tuple(cells[name][key] for key in ("mode", "down", "start", "large_rows")) for name in cells}
    scored = 2 * 4  # rows, for the residual stream and for their scores
    assert ways["stands alone"] == ("standalone", "select", "random", scored)
    assert ways["no Bridge"] == ("identity", None, "random", 2 * 8)  # nothing is scored or pruned for it
    assert all(ways[name] == ("none", None, None, None) for name in REFERENCES)
    assert 0 < cells["stands alone"]["bridge_share"] < 1
    assert cells["no Bridge"]["bridge_share"] is None
    text = (done.out / "quality.md").read_text(encoding="utf-8")
    assert all(f"| {text_of(cell['value'])} " in text for cell in cells.values())
    assert all(name in text for name in cells)
    assert f"    plugbridge bench quality {done.grid} --data DIR\n" in text
    assert (done.out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_commits_are_other_cells(copied: Done) -> None:
    """`main` of a hub model moved between two seeds, and between two variants of one."""
    groups = groups_of(load_grid(copied.grid), copied.grid.parent, False)

    def move(seed: int, variant: str, commit: str) -> None:
        folder = copied.root(seed, variant) / "evaluate"
        marker = read_marker(folder)
        assert marker is not None
        large = {"source": "org/large", "commit": commit}
        write_marker(folder / "done.json", {**marker, "depends": {**marker["depends"], "large": large}})

    for seed, commit in ((0, "a" * 40), (1, "b" * 40)):
        for variant in ("stands alone", "no Bridge"):
            move(seed, variant, commit)
    cells = cells_of(load_grid(copied.grid), groups, copied.out, "x")
    found = [(cell.seeds, cell.commits) for cell in cells if cell.variant == "no Bridge"]
    assert found == [([0], {"large": "a" * 40}), ([1], {"large": "b" * 40})]
    text = page(cells, "Title", "about", "x")
    assert "## rte, tiny, lora, large at aaaaaaaaaaaa\n" in text
    assert "## rte, tiny, lora, large at bbbbbbbbbbbb\n" in text
    assert left_out(groups, copied.out) == (4, {})
    move(1, "no Bridge", "c" * 40)
    cells = cells_of(load_grid(copied.grid), groups, copied.out, "x")
    assert [cell.seeds for cell in cells if cell.variant == "no Bridge"] == [[0]]
    assert left_out(groups, copied.out) == (3, {"rte, tiny, lora": ["no Bridge"]})


def test_what_is_missing_is_named(copied: Done) -> None:
    """By place: the variants of which a seed is missing, or none where nothing is done."""
    groups = groups_of(load_grid(copied.grid), copied.grid.parent, False)
    place = "rte, tiny, lora"
    assert left_out(groups, copied.out) == (4, {})
    (copied.root(1, "no Bridge") / "evaluate" / "done.json").unlink()
    assert left_out(groups, copied.out) == (3, {place: ["no Bridge"]})
    for seed in (0, 1):
        for name in ("stands alone", "no Bridge"):
            (copied.root(seed, name) / "evaluate" / "done.json").unlink(missing_ok=True)
    assert left_out(groups, copied.out) == (0, {place: []})


def text_of(value: float) -> str:
    return f"{value:.3f}"


def test_cells_are_of_the_predictions(copied: Done) -> None:
    """Of these, after two models' answers are replaced so that there is a gap to recover."""
    models = {
        "small tuned": ("stands alone", "small_tuned"), "large zero-shot": ("stands alone", "large_zero_shot"),
        "linear probe": ("stands alone", "large_probe"), "large tuned": ("stands alone", "large_tuned"),
        "stands alone": ("stands alone", "large_plugged"), "no Bridge": ("no Bridge", "large_plugged"),
        "stands alone, the Bridge itself": ("stands alone", "bridge_coupled"),
    }  # fmt: skip
    right: dict[str, Rows] = {name: [] for name in models}
    for name, (variant, model) in models.items():
        for seed in (0, 1):
            path = copied.root(seed, variant) / "evaluate" / "predictions" / f"{model}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            if name in ("small tuned", "large tuned"):
                first = next(iter(rows[0]["scores"]))
                rows = [{**row, "prediction": first if name == "small tuned" else row["right"]} for row in rows]
                rows = [{**row, "correct": row["prediction"] == row["right"]} for row in rows]
                write_jsonl(path, rows)
            right[name].append(np.array([float(row["prediction"] == row["right"]) for row in rows]))
    assert call(*copied.words, "--summary")[0] == 0
    cells = copied.cells()
    assert cells.keys() == models.keys()
    for name, found in right.items():
        wanted = intervals(found, right["small tuned"], right["large tuned"])
        assert tuple(cells[name][key] for key in ("value", "low", "high", "pgr", "pgr_low", "pgr_high")) == wanted
        assert wanted[0] == pytest.approx(np.mean(found))
    assert [cells[name]["pgr"] for name in ("small tuned", "large tuned")] == [0, 1]
    assert len({cell["value"] for cell in cells.values()}) > 3
    assert answers(copied.root(0, "no Bridge"), "small_tuned") is None  # only what is new was scored


def test_shared_stages_are_done_once(done: Done) -> None:
    groups = groups_of(load_grid(done.grid), done.grid.parent, False)
    configs = {group.seed: dict(group.variants) for group in groups}
    for seed in (0, 1):
        first, second = (done.root(seed, variant) for variant in ("stands alone", "no Bridge"))
        assert not (second / "ceiling").exists()  # no model that it scores needs it
        assert not (second / "score").exists()
        contents = [
            {str(p.relative_to(root / "tune")): p.read_bytes() for p in (root / "tune").rglob("*") if p.is_file()}
            for root in (first, second)
        ]
        assert contents[0] == contents[1]  # the marker too, with its seconds
        assert "done.json" in contents[0]
        for stage in ("couple", "plug", "evaluate"):
            assert (first / stage / "done.json").read_bytes() != (second / stage / "done.json").read_bytes()
        for variant in ("stands alone", "no Bridge"):  # what a run leaves is a configuration to run it again
            assert load_config(done.root(seed, variant) / "config.yaml") == configs[seed][variant]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("moment", ["import", "first group", "second group", "page"])
def test_an_interrupt_is_a_line_and_leaves_nothing_half(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    ran: list[str] = []

    def interrupted(*_given: Any) -> None:
        raise KeyboardInterrupt

    def run(group: Group, _data: Path | None, out: Path, _grid: Path | None) -> str:
        if moment in ("first group", "second group") and len(ran) == ["first group", "second group"].index(moment):
            raise KeyboardInterrupt
        shutil.copytree(done.out / group.name, out / group.name)
        ran.append(group.name)
        return group.name

    monkeypatch.setattr(quality, "run_group", run)
    if moment == "import":
        monkeypatch.setattr("plugbridge.bench.grid.load_grid", interrupted)
    if moment == "page":
        monkeypatch.setattr("plugbridge.bench.present.page", interrupted)
    there = replace(done, out=tmp_path / "out")
    code, out, err = call(*there.words)
    assert (code, out) == (130, "")
    assert err.endswith("\ninterrupted; run the same command again to resume\n")
    assert "Traceback" not in err
    assert len(ran) == {"import": 0, "first group": 0, "second group": 1, "page": 2}[moment]
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith("quality.") or name.endswith(".part")]


@pytest.mark.usefixtures("threads")
def test_a_second_call_only_reads(copied: Done) -> None:
    before, page = stamps(copied.out), (copied.out / "quality.md").read_bytes()
    tables = {str(copied.out / f"quality.{kind}") for kind in ("md", "json", "png")}
    cells = copied.cells()
    code, _, err = call(*copied.words)
    assert (code, err) == (0, "")
    after = stamps(copied.out)
    assert {name: at for name, at in after.items() if name not in tables} == {
        name: at for name, at in before.items() if name not in tables
    }
    assert copied.cells() == cells
    assert (copied.out / "quality.md").read_bytes() == page


@pytest.mark.usefixtures("threads")
def test_a_seed_that_is_not_finished_is_left_out_until_it_is(copied: Done) -> None:
    cells = copied.cells()
    (copied.root(0, "no Bridge") / "evaluate" / "done.json").unlink()
    assert call(copied.grid, "--out", copied.out, "--summary")[0] == 0
    seeds = {name: tuple(cell["seeds"]) for name, cell in copied.cells().items()}
    assert {name for name, found in seeds.items() if found == (1,)} == {"no Bridge"}
    assert {found for name, found in seeds.items() if name != "no Bridge"} == {(0, 1)}
    before = stamps(copied.root(0, "no Bridge") / "couple")
    assert call(*copied.words)[0] == 0
    assert stamps(copied.root(0, "no Bridge") / "couple") == before  # only scored again
    assert copied.cells() == cells


@pytest.mark.usefixtures("threads")
def test_a_setting_that_changes_no_result_leaves_runs_finished(copied: Done) -> None:
    cells = copied.cells()
    words = (copied.grid, "--out", copied.out, "--data", "x", "--summary", "--set")
    assert call(*words, "score.keep=memory")[0] == 0
    assert [cell["value"] for cell in copied.cells().values()] == [cell["value"] for cell in cells.values()]
    for path in copied.out.rglob("no-Bridge/config.yaml"):  # as before it had a default of its own in every mode
        raw = json.loads(path.read_text(encoding="utf-8"))
        assert raw["couple"]["optimizer"] is None
        raw["couple"]["optimizer"] = "adamw"
        path.write_text(json.dumps(raw), encoding="utf-8")
    assert call(*words, "score.keep=memory")[0] == 0
    assert [cell["value"] for cell in copied.cells().values()] == [cell["value"] for cell in cells.values()]
    assert call(*words, "score.samples=5")[0] == 0
    assert copied.cells() == {}


def test_a_summary_of_nothing_is_an_empty_table(done: Done, tmp_path: Path) -> None:
    code, out, err = call(done.grid, "--out", tmp_path / "empty", "--summary", "--full", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("0 cells in ")
    assert json.loads((tmp_path / "empty" / "quality.json").read_text()) == []
    assert (tmp_path / "empty" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert f"    plugbridge bench quality {done.grid} --full\n" in (tmp_path / "empty" / "quality.md").read_text()
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {f"quality.{k}" for k in ("md", "json", "png")}


def test_only_with_no_such_group_names_the_groups(done: Done) -> None:
    code, _, err = call(done.grid, "--out", str(done.out), "--only", "nothing")
    assert code == 2
    assert "no group's name holds that" in err
    assert "rte-s1" in err


def test_only_some_groups_and_a_table_elsewhere(done: Done, tmp_path: Path) -> None:
    words = ("--out", done.out, "--summary", "--table", tmp_path / "docs" / "page.md")
    assert call(done.grid, *words, "--only", "rte-s1", "--only", "nothing")[0] == 0
    cells = json.loads((tmp_path / "docs" / "page.json").read_text())
    assert [cell["seeds"] for cell in cells] == [[1]] * 7
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"page.md", "page.json", "page.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("compare: [no", "compare: [so"), "compare: no variant 'so Bridge'; known: "),
        (("variants: [", "variants: [stand, "), "no variant 'stand'; known: "),
        (("seeds:", "seed: 0\nseeds:"), "Extra inputs are not permitted"),
        (("couple.mode:", "couple.mod:"), "unknown key 'couple.mod'; did you mean 'mode'?"),
    ],
)
def test_a_mistake_in_the_grid_is_one_line_and_writes_nothing(
    done: Done, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = yaml.safe_dump(yaml.safe_load(done.grid.read_text()), default_flow_style=None)
    assert change[0] in text
    (tmp_path / "grid.yaml").write_text(text.replace(*change), encoding="utf-8")
    code, out, err = call(tmp_path / "grid.yaml", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"prediction": 1}', '{"right": NaN}'])
def test_predictions_that_are_none_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluate" / "predictions" / "large_plugged.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RunError, match=r"large_plugged\.jsonl holds no predictions as a run leaves them"):
        answers(tmp_path, "large_plugged")
