"""The paper's tables: what was printed is kept, every cell has its run, and what was not run is empty."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import VOCAB, save_model, toy_rows
from plugbridge.bench import paper
from plugbridge.bench.cells import Reproduced, collect, count_table, run_table
from plugbridge.bench.paper import Choice, Column, Pair, load_paper, planned, run_configs
from plugbridge.bench.similarity import changes, cosine, similarity_configs
from plugbridge.bench.tables import latex, markdown
from plugbridge.cli import main
from plugbridge.errors import ConfigError, TrainingDiverged
from plugbridge.models import load_model, parameter_count
from plugbridge.progress import Silent
from plugbridge.run import execute
from plugbridge.tasks.spec import load_task

CHOICE = Choice(Pair(small="small", large="large"), "standalone", 0)


def test_the_tables_are_the_papers() -> None:
    tables = load_paper().tables
    assert {name: (len(t.rows), len(t.columns)) for name, t in tables.items()} == {
        "table1": (11, 8), "table3": (11, 8), "table4": (11, 8), "table5": (6, 3), "table8": (4, 4),
    }  # fmt: skip
    printed = {(c.row.label, c.column.task, c.metric): c.printed for c in planned(tables["table3"], demo=False)}
    assert printed["large LoRA Plug-in", "rte", "accuracy"] == 90.1
    assert printed["large LoRA Plug-in", "multirc", "f1a"] == 86.9
    assert printed["small FT", "record", "exact_match"] == 74.2
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
    assert [cell.value for cell in before] == [None] * 6
    assert {cell.obtained for cell in before} == {"not run"}
    told: list[tuple[str, str]] = []
    reasons = run_table(table, choice, None, data, root, Silent(), lambda run, what: told.append((run, what)))
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
        assert Path(cell.obtained.rpartition(":")[0]).is_dir()
        assert cells[label, "copa"].value is None
        assert "COPA" in cells[label, "copa"].obtained
    marker = next(root.glob("*/rte-lora-*/tune/done.json"))
    first = marker.read_bytes()
    run_table(table, choice, None, data, root, Silent(), lambda _run, _what: None)
    assert marker.read_bytes() == first
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
    text = latex(CELLS, "Table 1: 100 % of x")
    assert r"large\_a & 71.2 (80.0, --8.8) & (70.0) \\" in text
    assert r"\caption{Table 1: 100 \% of x. Ours (paper, difference).}" in text
    assert text.count("{") == text.count("}")


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


def test_counts_of_models_that_are_not_at_hand_are_of_their_published_shapes() -> None:
    paper = load_paper()
    cells = {(c.row, c.task): c for c in count_table(paper.counts, paper.pairs, printed=True)}
    counted = {name: cells[name, "large"].value for name in paper.pairs}
    # openai-community/gpt2-xl, google-t5/t5-3b and t5-11b as they are published
    assert counted == {
        "gpt2": 1557.6112,
        "t5-3b": pytest.approx(2851.6, abs=0.1),
        "t5-xxl": pytest.approx(11307.3, abs=0.1),
    }
    assert [cells[name, "small"].value for name in paper.pairs] == [
        pytest.approx(124.44, abs=0.01), pytest.approx(222.9, abs=0.1), pytest.approx(737.67, abs=0.1),
    ]  # fmt: skip
    assert all("of the published shape of" in cell.obtained for cell in cells.values())


def test_a_run_that_fails_leaves_its_cells_empty_and_the_others_go_on(
    small_table: tuple[paper.Table, Choice, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, choice, folder = small_table

    def failing(root: Path, *args: Any) -> None:
        if "-lora-" in root.name:
            raise TrainingDiverged("loss is nan\nmore")
        execute(root, *args)

    monkeypatch.setattr("plugbridge.bench.cells.execute", failing)
    told: list[tuple[str, str]] = []
    reasons = run_table(
        table, choice, ["rte"], folder / "data", folder / "runs", Silent(), lambda run, what: told.append((run, what))
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
        "gpt2/small and gpt2/large", "t5/small and t5/large",
    }  # fmt: skip
    assert "\n| t5 | 0." in (tmp_path / "r" / "table2.md").read_text()
    assert _called(["reproduce", "table1", *words, "--summary"], monkeypatch) == 0
    assert "0 of 121 cells" in capsys.readouterr().out
    assert _called(["reproduce", "table9", *words], monkeypatch) == 2
    assert "no table 'table9'" in capsys.readouterr().err
    assert _called(["reproduce", "table1", "--small", small], monkeypatch) == 2
    assert "give both --small and --large" in capsys.readouterr().err
