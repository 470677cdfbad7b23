"""The leaderboard's files: the format of every task, and a finished run's answers to unlabelled rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_answers import multirc

import test_cli
from conftest import VOCAB, save_model, write_jsonl
from plugbridge.stages.leaderboard import board_lines, uninformed
from plugbridge.tasks.metrics import chosen, written
from plugbridge.tasks.rows import make_row
from plugbridge.tasks.spec import load_task, task_names
from plugbridge.tasks.unfold import UNFOLD
from test_cli import Call, mistake

call = test_cli.call  # a fixture
Raw = dict[str, Any]

CHOICE = {"premise": "He fell.", "choice1": "It was icy.", "choice2": "It was dry.", "question": "cause"}
PRONOUN = {"marked": "Mark lied, so *he* ran.", "span1_text": "Mark", "span2_text": "he"}
SENSES = {"word": "place", "sentence1": "My place.", "sentence2": "No place."}
PAIR = {"premise": "It rained.", "hypothesis": "It was wet."}
QUERY = {"passage": "Costa won.", "query": "@placeholder won.", "entities": ["Costa", "Zouma"], "entity_list": "Costa"}


@pytest.mark.parametrize(
    ("name", "kind", "raw", "choice", "line"),
    [
        ("boolq", "causal", {"passage": "a", "question": "b"}, 1, '{"idx": 7, "label": "true"}'),
        ("cb", "causal", PAIR, 2, '{"idx": 7, "label": "neutral"}'),
        ("copa", "causal", CHOICE, 1, '{"idx": 7, "label": 1}'),
        ("copa", "seq2seq", CHOICE, 0, '{"idx": 7, "label": 0}'),
        ("rte", "seq2seq", PAIR, 1, '{"idx": 7, "label": "not_entailment"}'),
        ("wic", "causal", SENSES, 0, '{"idx": 7, "label": "false"}'),
        ("wsc", "causal", PRONOUN, 1, '{"idx": 7, "label": "True"}'),
        ("ax-b", "causal", PAIR, 0, '{"idx": 7, "label": "entailment"}'),
        ("ax-g", "causal", PAIR, 1, '{"idx": 7, "label": "not_entailment"}'),
        ("record", "causal", QUERY, 1, '{"idx": 7, "label": "Zouma"}'),
    ],
)
def test_a_line_of_every_task(name: str, kind: str, raw: Raw, choice: int, line: str) -> None:
    task = load_task(name)
    assert task.leaderboard is not None
    form = task.form(kind)
    idx = "7" if name == "ax-b" else 7  # AX-b's ids are texts in some copies
    row = make_row(task, form, "here", {**raw, "idx": idx}, labelled=False)
    [found] = board_lines(task.leaderboard, form, [chosen(row, choice)])
    assert json.dumps(found) == line


@pytest.mark.parametrize(
    ("name", "raw", "text", "label"),
    [("record", QUERY, " Zouma ", "Zouma"), ("wsc", PRONOUN, "Mark", "True"), ("wsc", PRONOUN, "Pete", "False")],
)
def test_a_line_of_what_t5_wrote(name: str, raw: Raw, text: str, label: str) -> None:
    task = load_task(name)
    assert task.leaderboard is not None
    form = task.form("seq2seq")
    row = make_row(task, form, "here", {**raw, "idx": 7}, labelled=False)
    assert board_lines(task.leaderboard, form, [written(form, row, text)]) == [{"idx": 7, "label": label}]


@pytest.mark.parametrize(
    ("name", "kind", "raw", "label"),
    [
        ("rte", "causal", PAIR, "entailment"),
        ("record", "causal", QUERY, "Costa"),
        ("record", "seq2seq", QUERY, ""),
        ("wsc", "seq2seq", PRONOUN, "False"),
    ],
)
def test_a_line_of_what_no_model_read(name: str, kind: str, raw: Raw, label: str) -> None:
    task = load_task(name)
    assert task.leaderboard is not None
    form = task.form(kind)
    row = make_row(task, form, "here", {**raw, "idx": 7}, labelled=False)
    assert board_lines(task.leaderboard, form, [uninformed(form, row)]) == [{"idx": 7, "label": label}]


def test_multirc_is_nested_again() -> None:
    task = load_task("multirc")
    assert task.leaderboard is not None
    objects = multirc(3)
    rows = [make_row(task, task.causal, "here", raw) for o in objects for raw in UNFOLD["multirc"](o, "here")]
    found = board_lines(task.leaderboard, task.causal, [chosen(row, row.answer) for row in rows])
    expected = [
        {"idx": o["idx"], "passage": {"questions": [
            {"idx": q["idx"], "answers": [{"idx": a["idx"], "label": a["label"]} for a in q["answers"]]}
            for q in o["passage"]["questions"]]}}
        for o in objects
    ]  # fmt: skip
    assert found == expected


def test_the_leaderboards_file_names() -> None:
    boards = {name: load_task(name).leaderboard for name in task_names()}
    assert {board.file for board in boards.values() if board is not None} == {
        "BoolQ.jsonl", "CB.jsonl", "COPA.jsonl", "MultiRC.jsonl", "ReCoRD.jsonl", "RTE.jsonl", "WiC.jsonl", "WSC.jsonl",
        "AX-b.jsonl", "AX-g.jsonl",
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows of RTE, with test rows that have no label, and of AX-b; a pair that knows the label words."""
    root = tmp_path_factory.mktemp("submit")
    words = [{"yes": "True", "no": "False"}.get(word, word) for word in VOCAB]
    save_model("gpt2", root / "small", words, hidden=8, layers=1, heads=2, seed=1)
    save_model("gpt2", root / "large", words, hidden=16, layers=2, heads=4, seed=2)
    (root / "RTE").mkdir()
    (root / "AX-b").mkdir()
    labels = ("entailment", "not_entailment")
    rows = [{"premise": f"w{i}", "hypothesis": "it is", "label": labels[i % 2], "idx": i} for i in range(24)]
    write_jsonl(root / "RTE" / "train.jsonl", rows)
    write_jsonl(root / "RTE" / "val.jsonl", [{**row, "hypothesis": "is it"} for row in rows[:10]])
    write_jsonl(root / "RTE" / "test.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows[5:12]])
    names = {"premise": "sentence1", "hypothesis": "sentence2"}
    write_jsonl(root / "AX-b" / "AX-b.jsonl", [{names.get(k, k): v for k, v in row.items()} for row in rows[:4]])
    return root


def lines_of(path: Path) -> list[Raw]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_finished_run_answers_the_test_rows(call: Call, data: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "batch_size": 4}
    raw = {
        "small": str(data / "small"), "large": str(data / "large"), "task": "rte", "device": "cpu",
        "method": {"rank": 2}, "tune": train, "couple": train, "score": {"samples": 4}, "prune": {"reduction": 2},
        "evaluate": {"batch_size": 4},
    }  # fmt: skip
    (tmp_path / "rte.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert mistake(call("submit", "runs/rte", "--data", data, "--out", "board")).startswith("runs/rte is not a run")
    assert call("run", "rte.yaml", "--data", data, "--quiet")[0] == 0
    submit = ("submit", "runs/rte", "--data", data, "--out", "board", "--quiet")
    assert call(*submit) == (0, "board/RTE.jsonl: answers of large_plugged\n", "")
    found = lines_of(tmp_path / "board" / "RTE.jsonl")
    assert [line["idx"] for line in found] == list(range(5, 12))
    # rows 5 to 9 stand in the validation file too, where the run answered them
    scored = lines_of(tmp_path / "runs" / "rte" / "evaluate" / "predictions" / "large_plugged.jsonl")
    assert [line["label"] for line in found[:5]] == [p["prediction"] for p in scored[5:]]
    elsewhere = tmp_path / "official"
    (elsewhere / "RTE").mkdir(parents=True)
    (elsewhere / "RTE" / "test.jsonl").write_text((data / "RTE" / "test.jsonl").read_text())
    first = (tmp_path / "board" / "RTE.jsonl").read_text()
    assert "board/RTE.jsonl is there already" in mistake(call(*submit))
    assert call(*submit, "--tests", elsewhere, "--out", "other")[0] == 0
    assert (tmp_path / "other" / "RTE.jsonl").read_text() == first
    assert call(*submit, "--task", "ax-b", "--model", "small_tuned")[0] == 0
    assert [line["idx"] for line in lines_of(tmp_path / "board" / "AX-b.jsonl")] == [0, 1, 2, 3]
    odd = tmp_path / "odd"
    (odd / "AX-b").mkdir(parents=True)
    write_jsonl(odd / "AX-b" / "AX-b.jsonl", [{**PAIR, "idx": idx} for idx in (3, "4", "x5")])
    refused = mistake(call(*submit, "--task", "ax-b", "--tests", odd, "--model", "small_tuned"))
    assert refused == f"{odd}/AX-b/AX-b.jsonl:3: idx is 'x5'; the leaderboard needs a whole number"
    test = [{"premise": "w1", "hypothesis": " ".join(["w2"] * n), "idx": i} for i, n in enumerate((2, 99, 3, 98))]
    (odd / "RTE").mkdir()
    write_jsonl(odd / "RTE" / "test.jsonl", test)
    code, printed, _ = call(*submit, "--tests", odd, "--out", "long")
    wrote, unread = printed.splitlines()
    assert (code, wrote) == (0, "long/RTE.jsonl: answers of large_plugged")
    assert unread.startswith(
        f"2 of 4 rows were not read and have the first option: {odd}/RTE/test.jsonl:2: the prompt takes "
    )
    found = lines_of(tmp_path / "long" / "RTE.jsonl")
    assert [line["idx"] for line in found] == [0, 1, 2, 3]
    assert [found[1]["label"], found[3]["label"]] == ["entailment", "entailment"]
    write_jsonl(odd / "RTE" / "test.jsonl", [test[0], test[2]])
    assert call(*submit, "--tests", odd, "--out", "short") == (0, "short/RTE.jsonl: answers of large_plugged\n", "")
    assert lines_of(tmp_path / "short" / "RTE.jsonl") == found[::2]
    write_jsonl(odd / "RTE" / "test.jsonl", [test[1]])
    assert "without its passage, 'premise', it still takes" in mistake(call(*submit, "--tests", odd, "--out", "none"))
    assert "the run has no model 'large_tuned'; known: small_zero_shot, " in mistake(
        call(*submit, "--model", "large_tuned")
    )
    assert "asks otherwise than 'boolq'; run that task" in mistake(call(*submit, "--task", "boolq"))
    assert "task 'sst2' has no leaderboard" in mistake(call(*submit, "--task", "sst2"))
    used = tmp_path / "runs" / "rte" / "config.yaml"
    used.write_text(used.read_text().replace("rank: 2", "rank: 3"), encoding="utf-8")
    assert "done with other settings: method.alpha 4.0 → 6.0, method.rank 2 → 3;" in mistake(call(*submit))


def test_a_run_of_own_rows_has_no_leaderboard(call: Call, run_config: Callable[..., Raw], tmp_path: Path) -> None:
    raw = run_config(ceiling=None, evaluate={"limit": 4, "models": ["large_zero_shot"]})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert call("run", "c.yaml", "--quiet")[0] == 0
    assert "task 'own' has no leaderboard" in mistake(call("submit", "runs/c", "--out", "board"))
