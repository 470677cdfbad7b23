"""Tasks of every way to answer in a whole run: chosen by listed options, by question, and written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import test_cli
from conftest import VOCAB, WORDS, toy_rows, write_jsonl
from plugbridge.config import parse_config
from plugbridge.errors import DataError
from plugbridge.prepare import Prepared, prepare
from plugbridge.progress import Silent
from plugbridge.report import draw, read_report, recovered
from plugbridge.stages.build import build_stages
from plugbridge.tasks.encode import IGNORE, gold
from plugbridge.tasks.metrics import metrics_of, token_f1
from plugbridge.tasks.rows import Row
from test_cli import Call, mistake

call = test_cli.call  # a fixture
Raw = dict[str, Any]
Files = dict[str, list[Any]]


def multirc(count: int, start: int = 0) -> list[Raw]:
    """Paragraphs of two questions with three answers each; a word is right where its number is even."""
    rows: list[Raw] = []
    for i in range(start, start + count):
        questions = [
            {"question": f"is w{q} it", "idx": 2 * i + q, "answers": [
                {"text": f"w{(i + q + a) % 24}", "idx": 6 * i + 3 * q + a, "label": int((i + q + a) % 2 == 0)}
                for a in range(3)]}
            for q in range(2)
        ]  # fmt: skip
        rows.append({"idx": i, "passage": {"text": " ".join(WORDS[: i % 9 + 1] * 3), "questions": questions}})
    return rows


def record(count: int) -> list[Raw]:
    rows: list[Raw] = []
    for i in range(count):
        text = f"w{i % 10} is it : yes no"
        entities = [{"start": 0, "end": 1}, {"start": 11, "end": 13}, {"start": 15, "end": 16}]
        answers = [{"start": 0, "end": 1, "text": f"w{i % 10}"}, {"start": 15, "end": 16, "text": "no"}]
        query = {"query": "is @placeholder it", "idx": i, "answers": answers[: 1 + i % 2]}
        rows.append({"idx": 100 + i, "passage": {"text": text, "entities": entities}, "qas": [query]})
    return rows


def wsc(count: int) -> list[Raw]:
    return [
        {"text": f"w{i % 7} is : it", "idx": i, "label": i % 2 == 0,
         "target": {"span1_text": f"w{i % 7}", "span1_index": 0, "span2_text": "it", "span2_index": 3}}
        for i in range(count)
    ]  # fmt: skip


ROWS: dict[str, tuple[str, Callable[[int], list[Raw]]]] = {
    "multirc": ("MultiRC", multirc), "record": ("ReCoRD", record), "wsc": ("WSC", wsc),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up rows in the official files' form."""
    for folder, make in ROWS.values():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name, count in (("train", 12), ("val", 6)):
            write_jsonl(tmp_path / "data" / folder / f"{name}.jsonl", make(count))
    return tmp_path / "data"


def execute(raw: Raw, root: Path, data: Path | None) -> Raw:
    """Run all stages; returns the report."""
    prepared = prepare(parse_config(raw, "test"), data)
    from plugbridge.run import execute as run_stages
    from plugbridge.run import locked

    with locked(root):
        run_stages(root, build_stages(prepared, root, Silent()), None, lambda *_: None)
    return read_report(root)


SHORT = {"steps": 2, "batch_size": 4}


@pytest.mark.parametrize(
    ("name", "family", "metrics"),
    [
        ("multirc", "llama", ["f1a", "question_match"]),
        ("record", "t5", ["squad_f1", "squad_match"]),
        ("wsc", "t5", ["accuracy"]),
    ],
)
def test_a_run_of_a_task(
    run_config: Callable[..., Raw], data: Path, tmp_path: Path, name: str, family: str, metrics: list[str]
) -> None:
    couple = {**SHORT, "mode": "standalone"}
    raw = run_config(family, task=name, tune=SHORT, couple=couple, ceiling=None, evaluate={"batch_size": 5})
    report = execute({**raw, "data": str(data)}, tmp_path / "run", data)
    assert [list(row["metrics"]) for row in report["rows"]] == [metrics] * 5
    assert list(report["majority"]) == metrics
    cut = report["cut"]["large"]["train"]
    assert (cut["cut"] > 0, cut["emptied"]) == (name == "multirc", 0)
    count = {"multirc": 36, "record": 6, "wsc": 6}[name]
    for row in report["rows"]:
        assert all(0 <= value <= 1 for value in row["metrics"].values())
        lines = (tmp_path / "run" / "evaluate" / "predictions" / f"{row['name']}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert row["n"] == len(found) == count
        if name == "multirc":
            hits = [p["prediction"] == p["right"] for p in found]
            questions = [all(hits[i : i + 3]) for i in range(0, len(hits), 3)]  # the batches of 5 cut them
            assert row["metrics"]["question_match"] == pytest.approx(sum(questions) / len(questions))
            assert all(len(p["scores"]) == 2 for p in found)
        else:
            assert all(isinstance(p["written" if name == "wsc" else "prediction"], str) for p in found)
            assert all("scores" not in p for p in found)


def test_only_the_passage_is_cut(run_config: Callable[..., Raw], data: Path) -> None:
    """GPT-2 has 32 positions here: paragraphs go, the question and the answer stay."""
    p = prepare(parse_config(run_config("gpt2", task="multirc"), "test"), data)
    rows = [*p.large_rows["train"], *p.large_rows["test"]]
    cut = 0
    for encoded in rows:
        assert encoded.row is not None
        fields = encoded.row.fields
        ids = [VOCAB.index(word) if word in VOCAB else 2 for word in fields["paragraph"].split()]
        whole = list(p.large_encoder.text(encoded.row.prompt))
        rest = whole[len(ids) :]
        assert list(encoded.prompt)[-len(rest) :] == rest
        kept = list(encoded.prompt)[: -len(rest)]
        assert kept == ids[: len(kept)]
        assert len(encoded.prompt) + 1 <= 32
        cut += len(kept) < len(ids)
    assert 0 < cut < len(rows)


@pytest.mark.parametrize(
    ("family", "name", "most"), [("gpt2", "multirc", 20), ("t5", "record", 20), ("gpt2", "multirc", 500)]
)
def test_rows_are_no_longer_than_asked_for(
    run_config: Callable[..., Raw], data: Path, family: str, name: str, most: int
) -> None:
    def prepared(limit: int | None) -> Prepared:
        return prepare(parse_config(run_config(family, task=name, max_length=limit), "test"), data)

    whole, p = prepared(None), prepared(most)
    answer = 1 if family == "gpt2" else 0  # the longest, in tokens; T5's is not in the prompt's sequence
    longest, cut = (max(len(row.prompt) for row in found.large_rows["train"]) + answer for found in (whole, p))
    assert longest > most or most == 500
    assert cut <= most
    assert cut == longest or cut > most - 3  # whole words
    assert p.inputs["task"] != whole.inputs["task"]
    with pytest.raises(DataError, match="max_length"):
        prepared(8)


GENERATE: Raw = {"prompt": "is it : {word}", "generate": "{label}", "max_new_tokens": 3}


@pytest.fixture
def texts(tmp_path: Path) -> Raw:
    """The `task:` table of a task whose answers are written; two texts are right for even words."""

    def rows(seed: int, count: int) -> list[Raw]:
        return [
            {"word": r["word"], "label": ["yes", r["word"]] if r["label"] == "even" else "no"}
            for r in toy_rows(count, seed)
        ]

    sizes = {"train": 64, "validation": 8, "test": 8}
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows(i, n)) for i, (name, n) in enumerate(sizes.items())}
    return {**GENERATE, **{name: str(path) for name, path in files.items()}}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_users_own_texts_are_written(
    run_config: Callable[..., Raw], texts: Raw, tmp_path: Path, family: str
) -> None:
    """Training teaches to write and to stop: the text alone is an exact match."""
    task = {**texts, "metrics": ["rouge_l", "exact_match", "token_f1"]}
    train = {"steps": 60, "batch_size": 16, "learning_rate": 0.03}
    method = {"name": "lora", "rank": 8}
    evaluate = {"batch_size": 3, "split": "validation", "models": ["large_zero_shot", "large_tuned"]}
    raw = run_config(family, task=task, ceiling=train, evaluate=evaluate)
    raw["method"] = method
    report = execute(raw, tmp_path / "run", None)
    values = {row["name"]: row["metrics"] for row in report["rows"]}
    assert set(report["majority"]) == set(task["metrics"])
    assert values["large_tuned"]["exact_match"] > values["large_zero_shot"]["exact_match"]
    lines = (tmp_path / "run" / "evaluate" / "predictions" / "large_tuned.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    answers = [(p["prediction"].strip(), [text.strip() for text in p["accepted"]]) for p in found]
    assert values["large_tuned"]["exact_match"] == pytest.approx(sum(t in a for t, a in answers) / len(answers))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_models_with_a_side_network_write_too(
    run_config: Callable[..., Raw], texts: Raw, tmp_path: Path, family: str
) -> None:
    ladders = {f"{size}_ladder": {**SHORT, "reduction": 2} for size in ("small", "large")}
    raw = run_config(family, task=texts, tune=SHORT, couple={**SHORT, "mode": "ladder"}, ceiling=None,
                     baselines=ladders, evaluate={"batch_size": 3, "split": "validation"})  # fmt: skip
    report = execute(raw, tmp_path / "run", None)
    values = {row["name"]: row["metrics"] for row in report["rows"]}
    assert {"small_ladder", "large_ladder", "bridge_coupled"} <= set(values)
    for name in ("large_ladder", "bridge_coupled"):
        lines = (tmp_path / "run" / "evaluate" / "predictions" / f"{name}.jsonl").read_text().splitlines()
        assert any(json.loads(line)["prediction"] for line in lines)


@pytest.mark.parametrize(("family", "end"), [("gpt2", [1]), ("t5", [1])])
def test_training_writes_the_first_text_and_an_end_mark(
    run_config: Callable[..., Raw], texts: Raw, family: str, end: list[int]
) -> None:
    p = prepare(parse_config(run_config(family, task=texts), "test"), None)
    for row in p.rows["train"]:
        assert row.row is not None
        labels = [token for token in gold(p.encoder, [row]).labels[0].tolist() if token != IGNORE]
        assert labels == [VOCAB.index(row.row.accepted[0]), *end]
        assert len(row.options) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": {"a": "b"}}, "task: give either `words`, `options` or `generate`"),
        ({"generate": None}, "task: give either `words`, `options` or `generate`"),
        ({"generate": "{word}"}, "task: `generate` is '{word}'; it must hold the label's field, {label}"),
        (
            {"metrics": ["accuracy"]},
            "task: no metric 'accuracy' for such answers; known: exact_match, rouge_l,",
        ),
        ({"metrics": []}, "task.metrics: List should have at least 1 item"),
        ({"max_new_tokens": 0}, "task.max_new_tokens: Input should be greater than or equal to 1"),
        ({"label": "gone", "generate": "{gone}"}, "train.jsonl:1: field 'gone' is missing"),
    ],
)
def test_mistakes_of_written_answers(
    call: Call, run_config: Callable[..., Raw], texts: Raw, tmp_path: Path, changes: Raw, message: str
) -> None:
    task = {key: value for key, value in {**texts, **changes}.items() if value is not None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run_config(task=task)), encoding="utf-8")
    assert message in mistake(call("run", "c.yaml", "--out", "run"))


def test_a_probe_of_written_answers_is_refused(
    call: Call, run_config: Callable[..., Raw], texts: Raw, tmp_path: Path
) -> None:
    raw = run_config(task=texts, evaluate={"probe": True})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert "evaluate.probe chooses among options, but in task" in mistake(call("run", "c.yaml"))


def test_a_probe_of_options_that_rows_list(run_config: Callable[..., Raw], data: Path, tmp_path: Path) -> None:
    """ReCoRD's entities: a probe chooses one of a row's own, whether the large model is in memory or on disk."""
    found: dict[str, list[int]] = {}
    for resident in ("all", "none"):
        evaluate = {"batch_size": 5, "probe": True, "models": ["small_probe", "large_probe"]}
        raw = run_config("gpt2", task="record", ceiling=None, resident=resident, evaluate=evaluate)
        report = execute(raw, tmp_path / resident, data)
        values = {row["name"]: row for row in report["rows"]}
        assert {"small_probe", "large_probe"} <= values.keys()
        lines = (tmp_path / resident / "evaluate" / "predictions" / "large_probe.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[resident] = [row["prediction"] for row in rows]
        assert len(rows) == values["large_probe"]["n"] == 6
    assert found["all"] == found["none"]
    assert set(found["all"]) <= {"no", "yes", *(f"w{i}" for i in range(10))}
    assert len(set(found["all"])) > 1


def test_a_correlation_is_reported_and_drawn_below_zero(tmp_path: Path) -> None:
    values = {"small_tuned": -0.2, "large_plugged": 0.1, "large_tuned": 0.4}
    assert recovered(values, 1000, "matthews") == pytest.approx(0.5)
    assert recovered(values, 15, "matthews") is None
    rows = [{"name": name, "metric": "matthews", "metrics": {"matthews": value}, "value": value, "n": 9}
            for name, value in values.items()]  # fmt: skip
    report = {"rows": rows, "majority": {"matthews": 0.0}, "split": "test", "task": "t", "method": "m", "mode": "f",
              "models": {"bridge": None}}  # fmt: skip
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_take_answers_in_any_order() -> None:
    from plugbridge.tasks.metrics import Answer

    rows = [Answer(Row("", ("a b",), 0, {}, ""), -1, text) for text in ("b", "", "c b")]
    assert metrics_of(("token_f1",), rows) == {"token_f1": token_f1(rows[::-1])}
