"""The paper's tables: what was printed is kept, every cell has its run, and what was not run is empty."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import test_prepare
from conftest import VOCAB, save_model, toy_rows
from plugbridge.bench import paper
from plugbridge.bench import reproduce as reproduce_module
from plugbridge.bench.asked import Asked
from plugbridge.bench.cells import SHARE, Reproduced, as_rows, collect, count_table, run_table
from plugbridge.bench.paper import Choice, Column, Pair, load_paper, planned, run_configs
from plugbridge.bench.similarity import Likeness, changes, cosine, similarity_configs
from plugbridge.bench.tables import latex, markdown
from plugbridge.cli import main
from plugbridge.errors import ConfigError, TrainingDiverged
from plugbridge.markers import read_marker, write_marker
from plugbridge.models import load_model, parameter_count
from plugbridge.progress import Silent
from plugbridge.run import execute
from plugbridge.tasks.spec import load_task

hub = test_prepare.hub  # a fixture
CHOICE = Choice(Pair(small="small", large="large"), "standalone", 0)


def test_the_tables_are_the_papers() -> None:
    tables = load_paper().tables
    assert {name: (len(t.rows), len(t.columns)) for name, t in tables.items()} == {
        "table1": (11, 8), "table3": (11, 8), "table4": (11, 8), "table5": (6, 3), "table8": (4, 4),
    }  # fmt: skip
    printed = {(c.row.label, c.column.task, c.metric): c.printed for c in planned(tables["table3"], demo=False)}
    assert printed["large LoRA Plug-in", "rte", "accuracy"] == 90.1
    assert printed["large LoRA Plug-in", "multirc", "f1a"] == 86.9
    assert printed["small FT", "record", "squad_match"] == 74.2
    # the same run is printed in three tables
    eight = {(c.row.label, c.column.task): c.printed for c in planned(tables["table8"], demo=False)}
    five = {(c.row.label, c.column.task): c.printed for c in planned(tables["table5"], demo=False)}
    for task in ("rte", "wic"):
        assert printed["large LoRA Plug-in", task, "accuracy"] == eight["LoRA Plug-in (SLM)", task]
        assert printed["large LoRA Plug-in", task, "accuracy"] == five["r = 16", task]


def test_every_metric_of_a_column_is_one_of_its_task() -> None:
    for table in load_paper().tables.values():
        for column in table.columns:
            assert set(column.metrics) <= set(load_task(column.task).metrics), column


def test_a_run_makes_the_models_that_its_rows_show_and_no_others() -> None:
    configs = run_configs(load_paper().tables["table1"], CHOICE, None)
    assert len(configs) == 8 * 3
    lora, prefix = configs["rte-lora-r16-random"], configs["rte-prefix-r16-random"]
    assert lora.baselines.large_finetuned is not None
    assert lora.baselines.small_finetuned is not None
    assert prefix.baselines.large_finetuned is None
    assert prefix.ceiling is not None
    assert lora.prune.budget == 1 / 16
    assert lora.couple.mode == "standalone"
    five = run_configs(load_paper().tables["table5"], CHOICE, ["wic"])
    assert {c.prune.budget for c in five.values()} == {1 / r for r in (2, 4, 8, 16, 32, 64)}
    assert all(c.ceiling is None for c in five.values())
    eight = run_configs(load_paper().tables["table8"], CHOICE, None)
    assert {c.couple.plug for c in eight.values()} == {"random", "fresh"}
    with pytest.raises(ConfigError, match="no task 'sst2'"):
        run_configs(load_paper().tables["table8"], CHOICE, ["sst2"])


def test_settings_of_models_that_are_not_made_are_left_out() -> None:
    sets = ("ceiling.steps=7", "baselines.large_finetuned.steps=8", "tune.steps=9")
    table = load_paper().tables["table8"]
    config = next(iter(run_configs(table, Choice(CHOICE.pair, "standalone", 0, sets), None).values()))
    assert config.tune.steps == 9
    assert config.ceiling is None
    assert config.baselines.large_finetuned is None


@pytest.fixture
def small_table(tmp_path: Path) -> tuple[paper.Table, Choice, Path]:
    """Three rows of Table 1 on a tiny pair, on RTE with made-up rows and on COPA without any."""
    folder = tmp_path / "data" / "RTE"
    folder.mkdir(parents=True)
    rows = [
        {"premise": r["word"], "hypothesis": r["word"], "idx": i,
         "label": "entailment" if r["label"] == "even" else "not_entailment"}
        for i, r in enumerate(toy_rows(40, 0))
    ]  # fmt: skip
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = load_paper().tables["table1"]
    labels = ("small FT", "large Adapter", "large Adapter Plug-in")
    columns = (Column(task="rte", metrics=("accuracy",)), Column(task="copa", metrics=("accuracy",)))
    kept = tuple(
        row.model_copy(update={"values": (row.values[6], row.values[3])}) for row in whole.rows if row.label in labels
    )
    table = whole.model_copy(update={"columns": columns, "rows": kept})
    words = [*VOCAB[:-2], "entailment", "not_entailment"]
    small = save_model("t5", tmp_path / "small", words, hidden=8, layers=1, heads=2)
    large = save_model("t5", tmp_path / "large", words, hidden=16, layers=2, heads=4)
    train = ("tune", "couple", "ceiling", "baselines.small_finetuned")
    sets = (
        *(f"{t}.steps=2" for t in train),
        "score.samples=4",
        "method.rank=2",
        "evaluate.limit=10",
        "prune.budget=0.5",
    )
    return table, Choice(Pair(small=str(small), large=str(large)), "standalone", 0, sets), tmp_path


def test_a_table_is_run_resumed_and_written(small_table: tuple[paper.Table, Choice, Path]) -> None:
    table, choice, folder = small_table
    root, data = folder / "runs", folder / "data"
    before = collect("table1", table, choice, None, root, {})
    assert [cell.value for cell in before] == [None] * 9
    assert [cell.printed for cell in before if cell.task == "#Params"] == [100, 1.98, 0]
    assert {cell.obtained for cell in before} == {"not run"}
    told: list[tuple[str, str]] = []
    reasons = run_table("table1", table, choice, None, data, root, Silent(), lambda run, what: told.append((run, what)))
    assert sorted(reasons) == ["copa-adapter-r16-random", "copa-lora-r16-random"]
    assert all("COPA" in reason for reason in reasons.values())
    cells = {(c.row, c.task): c for c in collect("table1", table, choice, None, root, reasons)}
    for label in ("small FT", "large Adapter", "large Adapter Plug-in"):
        cell = cells[label, "rte"]
        assert cell.value is not None
        assert cell.printed is not None
        assert cell.difference == cell.value - cell.printed
        assert 0 <= cell.value <= 100
        assert cell.n == 10
        where, _, how = cell.obtained.partition(": ")
        assert Path(where).is_dir()
        assert "2 steps of 32 rows at 0.0" in how
        assert ("coupled standalone through a Bridge of 1/" in how) == (label == "large Adapter Plug-in")
        assert cells[label, "copa"].value is None
        assert "COPA" in cells[label, "copa"].obtained
    shares = {row: cell for (row, task), cell in cells.items() if task == "#Params"}
    assert shares["small FT"].value == 100
    adapter = shares["large Adapter"]
    assert adapter.value is not None
    assert adapter.difference == adapter.value - 1.98
    assert shares["large Adapter Plug-in"].value == adapter.value  # an ordinary checkpoint of the same method
    marker = next(root.glob("*/rte-lora-*/evaluate/done.json"))
    first = marker.read_bytes()
    run_table("table1", table, choice, None, data, root, Silent(), lambda _run, _what: None)
    assert marker.read_bytes() == first
    assert all(cell.commits == {} for cell in cells.values())
    found = read_marker(marker.parent)
    assert found is not None
    commits = {"small": "a" * 40, "large": "b" * 40}
    there = {size: {"source": f"org/{size}", "commit": commit} for size, commit in commits.items()}
    write_marker(marker, {**found, "depends": {**found["depends"], **there}})
    told_of = [cell for cell in collect("table1", table, choice, None, root, reasons) if cell.commits]
    assert {cell.row for cell in told_of} == {"small FT"}  # of that run; the others are of directories
    assert all(cell.obtained.endswith(f", small at {'a' * 12}, large at {'b' * 12}") for cell in told_of)
    assert all(row["commits"] == commits for row in as_rows(told_of))
    other = Choice(choice.pair, "standalone", 0, (*choice.sets, "tune.steps=3"))
    assert all(cell.value is None for cell in collect("table1", table, other, None, root, {}))


CELLS = [
    Reproduced("table1", "large_a", "rte", "accuracy", 80.0, 71.25, -8.75, 100, "runs/x: large_tuned"),
    Reproduced("table1", "large_a", "wic", "accuracy", 70.0, None, None, None, "task 'wic' needs its files"),
]


def test_markdown_shows_ours_the_printed_value_and_the_difference() -> None:
    page = markdown(CELLS, "Table 1: x", "a note", "plugbridge reproduce table1")
    assert "| large_a | 71.2 (80.0, -8.8) | (70.0) |" in page
    assert "    plugbridge reproduce table1" in page
    assert "- large_a: task 'wic' needs its files" in page
    assert "- large_a: runs/x: large_tuned, 100 rows" in page


def test_latex_is_escaped_and_empty_cells_stay_empty() -> None:
    text = latex(CELLS, "Table 1: 100 % of x", "In mode `a_b`.", "plugbridge reproduce table1")
    assert r"large\_a & 71.2 (80.0, --8.8) & (70.0) \\" in text
    assert r"\caption{Table 1: 100 \% of x. Ours (paper, difference). In mode a\_b.}" in text
    assert text.count("{") == text.count("}")
    assert "%     plugbridge reproduce table1\n" in text
    assert "% - large_a, rte: runs/x: large_tuned, 100 rows\n" in text
    assert all(line.startswith("%") for line in text.partition(r"\begin{table}")[0].splitlines())
    assert "Ours." in latex([replace(CELLS[0], printed=None, difference=None)], "x", "y", "z")


def test_shares_of_parameters_have_two_digits() -> None:
    cells = [
        Reproduced("table1", "a", "#Params", SHARE, 1.98, 0.4567, 0.4567 - 1.98, None, "runs/x: large_tuned"),
        Reproduced("table1", "b", "#Params", SHARE, 100.0, 100.0, 0.0, None, "runs/x: large_finetuned"),
        Reproduced("table1", "c", "#Params", SHARE, 0.0, 0.4567, 0.4567, None, "runs/x: large_plugged"),
    ]
    page = markdown(cells, "x", "y", "z")
    assert "| | #Params, % of the model's |" in page
    assert "| a | 0.46 (1.98, -1.52) |" in page
    assert "| b | 100.0 (100.0, +0.0) |" in page
    assert "| c | 0.46 (0.0, +0.5) |" in page


def test_counts_are_the_models_own(pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    small, large = map(str, pairs("gpt2"))
    gone = Pair(small=str(tmp_path / "none"), large=large)
    cells = count_table(load_paper().counts, {"gpt2": Pair(small=small, large=large), "t5-3b": gone}, printed=True)
    found = {(c.row, c.task): c for c in cells}
    whole = parameter_count(load_model(large)) / 1e6
    assert found["gpt2", "large"].value == whole
    assert found["gpt2", "large"].printed == 1542.0
    bridge = found["gpt2", "Bridge"].value
    assert bridge is not None
    assert 0 < bridge <= whole / 16
    assert found["t5-3b", "large"].value is None
    assert "does not exist" in found["t5-3b", "large"].obtained


def test_results_of_models_from_the_hub_say_of_which_commit(
    hub: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "a" * 40, "b" * 40
    hub("small", old, 1)
    hub("large", old, 2, 64)
    pair = Pair(small="org/small", large="org/large")

    def counted() -> set[str]:
        cells = count_table(load_paper().counts, {"gpt2": pair}, printed=True)
        assert [cell.commits["small"] for cell in cells] == [old] * 3
        return {cell.obtained.partition(";")[0] for cell in cells}

    assert counted() == {f"org/small and org/large, small at {'a' * 12}, large at {'a' * 12}"}
    hub("large", new, 3, 64)
    assert counted() == {f"org/small and org/large, small at {'a' * 12}, large at {'b' * 12}"}

    shapes: list[str] = []

    def count(shape: Any, *_: Any) -> Any:
        shapes.append(shape.name)
        raise TrainingDiverged("enough")

    asked = Asked("table6", ("org/small", "org/large"), False, "standalone", None, 0, (), None, tmp_path,
                  tmp_path / "page.md", True, "plugbridge reproduce")  # fmt: skip
    monkeypatch.setattr(reproduce_module, "count_shape", count)
    with pytest.raises(TrainingDiverged):
        next(iter(reproduce_module.reproduce(asked, Silent(), lambda _run, _what: None)))
    assert shapes == [f"org/large, small at {'a' * 12}, large at {'b' * 12}"]

    monkeypatch.setattr(reproduce_module, "read_report", lambda _folder: {})
    monkeypatch.setattr(reproduce_module, "commits_of_run", lambda _folder: {"large": new})
    alike = [Likeness(name, "h.0", 0.5) for name in "abc"]
    monkeypatch.setattr(reproduce_module, "compare", lambda _method, *_folders: alike)
    likeness = replace(asked, table="fig1b", tasks=("rte",))
    [*_] = reproduce_module.reproduce(likeness, Silent(), lambda _run, _what: None)
    assert f"\nModels from the hub: large at {'b' * 12}.\n" in asked.page.read_text(encoding="utf-8")
    assert json.loads(asked.page.with_suffix(".json").read_text())[0]["commits"] == {"large": new}


def test_counts_of_models_that_are_not_at_hand_are_of_their_published_shapes() -> None:
    paper = load_paper()
    names = list(paper.counts.pairs)
    cells = {
        (c.row, c.task): c for c in count_table(paper.counts, {name: paper.pairs[name] for name in names}, printed=True)
    }
    counted = {name: cells[name, "large"].value for name in names}
    # openai-community/gpt2-xl, google-t5/t5-3b and t5-11b as they are published
    assert counted == {
        "gpt2": 1557.6112,
        "t5-3b": pytest.approx(2851.6, abs=0.1),
        "t5-xxl": pytest.approx(11307.3, abs=0.1),
    }
    assert [cells[name, "small"].value for name in names] == [
        pytest.approx(124.44, abs=0.01), pytest.approx(222.9, abs=0.1), pytest.approx(737.67, abs=0.1),
    ]  # fmt: skip
    assert all("of the published shape of" in cell.obtained for cell in cells.values())


def test_a_run_that_fails_leaves_its_cells_empty_and_the_others_go_on(
    small_table: tuple[paper.Table, Choice, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, choice, folder = small_table

    def failing(root: Path, *args: Any, **options: Any) -> None:
        if "-lora-" in root.name:
            raise TrainingDiverged("loss is nan\nmore")
        execute(root, *args, **options)

    monkeypatch.setattr("plugbridge.bench.cells.execute", failing)
    told: list[tuple[str, str]] = []
    reasons = run_table(
        "table1",
        table,
        choice,
        ["rte"],
        folder / "data",
        folder / "runs",
        Silent(),
        lambda run, what: told.append((run, what)),
    )
    assert reasons == {"rte-lora-r16-random": "loss is nan"}
    assert ("rte-lora-r16-random", "loss is nan") in told
    cells = {(c.row, c.task): c for c in collect("table1", table, choice, ["rte"], folder / "runs", reasons)}
    assert cells["small FT", "rte"].value is None
    assert cells["large Adapter", "rte"].value is not None


def test_figure_1b_compares_plugs_that_were_not_coupled_whatever_is_set() -> None:
    sets = ("couple.steps=400", "tune={steps: 7}")
    for config in similarity_configs(replace(CHOICE, sets=sets), "rte", "lora").values():
        assert (config.couple.steps, config.tune.steps) == (0, 7)
    with pytest.raises(ConfigError, match="expected key=value"):
        similarity_configs(replace(CHOICE, sets=("tune.steps",)), "rte", "lora")


def test_what_a_module_adds_does_not_depend_on_how_it_is_factored() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, turn = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 6), (5, 2), (2, 2)))
    head = "base_model.model.h.0.attn"
    first = changes("lora", {f"{head}.lora_A.weight": a, f"{head}.lora_B.weight": b})
    second = changes("lora", {f"{head}.lora_A.weight": turn @ a, f"{head}.lora_B.weight": b @ turn.inverse()})
    assert list(first) == ["h.0.attn"]
    assert cosine(first["h.0.attn"], second["h.0.attn"]) == pytest.approx(1.0, abs=1e-9)
    assert cosine(first["h.0.attn"], -second["h.0.attn"]) == pytest.approx(-1.0, abs=1e-9)
    assert cosine(torch.zeros(2, 2), torch.ones(2, 2)) == 0.0
    assert not math.isnan(cosine(torch.zeros(2, 2), torch.zeros(2, 2)))


def _called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", ["plugbridge", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_command_writes_all_its_files(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    small, large = map(str, pairs("gpt2"))
    words = ["--small", small, "--large", large, "--out", str(tmp_path / "r"), "--quiet"]
    assert _called(["reproduce", "table2", *words], monkeypatch) == 0
    page = (tmp_path / "r" / "table2.md").read_text()
    assert "| your pair |" in page
    assert json.loads((tmp_path / "r" / "table2.json").read_text())[0]["printed"] is None
    assert (tmp_path / "r" / "table2.tex").is_file()
    monkeypatch.chdir(Path(__file__).parents[2])
    demo = ["reproduce", "table2", "--demo", "--out", str(tmp_path / "r"), "--quiet"]
    assert _called(demo, monkeypatch) == 0
    assert {cell["obtained"] for cell in json.loads((tmp_path / "r" / "table2.json").read_text())} == {
        "gpt2/small and gpt2/large; the Bridge is 1/19.5 of the large model",
        "t5/small and t5/large; the Bridge is 1/16.0 of the large model",
    }
    assert "\n| t5 | 0." in (tmp_path / "r" / "table2.md").read_text()
    assert _called(["reproduce", "table1", *words, "--summary"], monkeypatch) == 0
    assert "0 of 132 cells" in capsys.readouterr().out
    for table, given, said in (
        (
            "table1",
            ["--set", "couple.mode=ladder"],
            "--set couple.mode: the paper's tables set couple.mode",
        ),
        ("table1", ["--set", "prune={budget: 0.1}"], "--set prune: the paper's tables set prune.budget themselves"),
        ("table5", ["--set", "evaluate.models=[small_tuned]"], "--set evaluate.models: the paper's tables set"),
        ("table5", ["--mode", "nonsense"], "no coupling mode 'nonsense'"),
        ("table2", ["--mode", "ladder"], "table2 does not read --mode"),
        ("table6", ["--set", "seed=1"], "table6 does not read --set"),
        ("fig1a", ["--seed", "1"], "fig1a does not read --seed"),
        ("fig1b", ["--mode", "ladder"], "fig1b does not read --mode"),
        ("fig1b", ["--task", "rte", "--task", "cb"], "fig1b is about one task"),
    ):
        assert _called(["reproduce", table, *words, *given], monkeypatch) == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert _called(["reproduce", "table9", *words], monkeypatch) == 2
    assert "no table 'table9'" in capsys.readouterr().err
    assert _called(["reproduce", "table1", "--small", small], monkeypatch) == 2
    assert "give both --small and --large" in capsys.readouterr().err
