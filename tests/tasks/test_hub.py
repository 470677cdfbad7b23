"""Rows of the hub, from a stand-in for `datasets`: the same rows as from the official files."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_unfold import MULTIRC, RECORD, WSC

from conftest import write_jsonl
from plugbridge.config import load_config, parse_config
from plugbridge.errors import ConfigError, DataError
from plugbridge.prepare import prepare
from plugbridge.tasks.hub import flat, hub_rows
from plugbridge.tasks.rows import load_rows
from plugbridge.tasks.spec import load_task, task_names
from plugbridge.tasks.unfold import UNFOLD

Raw = dict[str, Any]


class Rows(list[Raw]):
    """Rows with a fingerprint, as `datasets` has them."""

    _fingerprint = "f00d"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Raw]], list[tuple[str, str, str]]]:
    """Put rows on a hub; returns what was asked of it."""

    def put(rows: list[Raw]) -> list[tuple[str, str, str]]:
        asked: list[tuple[str, str, str]] = []

        def load_dataset(path: str, name: str, split: str) -> Rows:
            asked.append((path, name, split))
            return Rows(rows)

        module = ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        module.__version__ = "4.0.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return put


PAIRS = [{"premise": f"w{i}", "hypothesis": "it is", "label": i % 2, "idx": i} for i in range(20)]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_same_rows_as_from_the_files(hub: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    asked = hub(PAIRS)
    names = ("entailment", "not_entailment")
    for file in ("train", "val"):
        write_jsonl(tmp_path / f"{file}.jsonl", [{**row, "label": names[row["label"]]} for row in PAIRS])
    found, prints = hub_rows(load_task("rte"), kind, 3)
    assert asked == [("aps/super_glue", "rte", "train"), ("aps/super_glue", "rte", "validation")]
    assert prints == {"aps/super_glue/rte:train": "f00d", "aps/super_glue/rte:validation": "f00d"}
    local = load_rows(load_task("rte"), kind, tmp_path, 3)
    for split, rows in local.items():
        assert [(r.prompt, r.options, r.answer) for r in found[split]] == [
            (r.prompt, r.options, r.answer) for r in rows
        ]
    assert found["test"][4].where == "aps/super_glue/rte:validation:4"


def record_rows(raw: Raw) -> list[Raw]:
    """ReCoRD's rows as the hub's loader makes them: texts of a list once each, in sorted order."""
    text = raw["passage"]["text"]
    spans = [(entity["start"], entity["end"] + 1) for entity in raw["passage"]["entities"]]
    return [
        {
            "passage": text, "query": query["query"], "entities": sorted({text[a:b] for a, b in spans}),
            "entity_spans": {"text": [text[a:b] for a, b in spans], "start": [a for a, _ in spans],
                             "end": [b for _, b in spans]},
            "answers": sorted({answer["text"] for answer in query["answers"]}),
            "idx": {"passage": raw["idx"], "query": query["idx"]},
        }
        for query in raw["qas"]
    ]  # fmt: skip


def records(count: int) -> list[Raw]:
    """Objects of ReCoRD's file, all entities and answers out of order."""
    queries = [[{**query, "idx": 2 * i + j} for j, query in enumerate(RECORD["qas"])] for i in range(count)]
    return [{**RECORD, "idx": i, "qas": queries[i]} for i in range(count)]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_record_rows_are_equal_whichever_source(hub: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    objects = records(10)
    hub([row for raw in objects for row in record_rows(raw)])
    for file in ("train", "val"):
        write_jsonl(tmp_path / f"{file}.jsonl", objects)
    found, _ = hub_rows(load_task("record"), kind, 3)
    local = load_rows(load_task("record"), kind, tmp_path, 3)
    assert {split: [replace(row, where="") for row in rows] for split, rows in found.items()} == {
        split: [replace(row, where="") for row in rows] for split, rows in local.items()
    }
    assert found["test"][1].accepted == ((" Costa", " Zouma") if kind == "causal" else ("Costa", "Zouma"))


def test_nested_rows_are_those_of_the_files() -> None:
    [first, *_] = UNFOLD["multirc"](MULTIRC, "here")
    theirs = {k: v for k, v in first.items() if not k.endswith("idx")}
    ids = {"paragraph": 6, "question": 12, "answer": 30}
    assert flat(load_task("multirc"), {**theirs, "idx": ids}, "here") == {**first, "label": "1"}
    rows = [flat(load_task("record"), row, "here") for row in record_rows(RECORD)]
    assert rows == list(UNFOLD["record"](RECORD, "here"))
    [first] = UNFOLD["wsc"](WSC, "here")
    theirs = {"text": WSC["text"], **WSC["target"], "idx": 5, "label": 1}
    assert flat(load_task("wsc"), theirs, "here") == {**first, "label": "true"}


def test_labels_are_the_tasks_own() -> None:
    for name in task_names():
        task = load_task(name)
        if task.hub is not None and task.hub.labels and task.causal.words is not None:
            assert set(task.hub.labels) == set(task.causal.words)


def test_mistakes(hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^task 'sst2' is not read from the hub; give --data DIR$"):
        hub_rows(load_task("sst2"), "causal", 0)
    hub([{**PAIRS[0], "label": -1}])
    with pytest.raises(DataError, match=r"^aps/super_glue/rte:train:0: label -1 is not a number below 2$"):
        hub_rows(load_task("rte"), "causal", 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"^--data hub needs the package datasets; pip install 'plugbridge\[hub\]'$"):
        hub_rows(load_task("rte"), "causal", 0)


class DatasetsError(Exception):
    """Stands for the library's own base class, which is no OSError."""


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ConnectionError("no network"), DataError, "cannot read aps/super_glue/rte:train from the hub: no network"),
        (ValueError("no split"), DataError, "cannot read aps/super_glue/rte:train from the hub: no split"),
        (RuntimeError("Dataset scripts are no longer supported"), ConfigError,
         "datasets 4.0.0 cannot load aps/super_glue/rte:train from the hub: Dataset scripts are no longer supported; "
         "try another version of datasets, or give --data DIR"),
        (DatasetsError("odd"), ConfigError, "datasets 4.0.0 cannot load aps/super_glue/rte:train from the hub: odd; "
         "try another version of datasets, or give --data DIR"),
    ],
)  # fmt: skip
def test_what_the_library_cannot_do(
    hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], message: str
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise raised

    hub(PAIRS)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        hub_rows(load_task("rte"), "causal", 0)


def test_what_the_library_says_over_several_lines_is_one(
    hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\n  (offline)")

    hub(PAIRS)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"^cannot read aps/super_glue/rte:train from the hub: Couldn't reach the Hub \("
    ):
        hub_rows(load_task("rte"), "causal", 0)


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_by_the_library(
    hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    """Which has looked up whether it may when it was imported."""
    hub(PAIRS)
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setattr(sys.modules["datasets"], "config", config, raising=False)
    monkeypatch.setattr("plugbridge.tasks.hub.ask_hub", lambda _what: reached)
    hub_rows(load_task("rte"), "causal", 0)
    assert config.HF_HUB_OFFLINE is not reached


@pytest.mark.parametrize(("name", "there"), [("ax-b", "axb"), ("ax-g", "axg")])
def test_diagnostics_are_trained_on_rte(hub: Callable[..., Any], name: str, there: str) -> None:
    task = load_task(name)
    names = {"premise": "sentence1", "hypothesis": "sentence2"} if name == "ax-b" else {}
    asked = hub([{names.get(k, k): v for k, v in row.items()} for row in PAIRS])
    found, prints = hub_rows(task, "causal", 0)
    assert asked == [("aps/super_glue", "rte", "train"), ("aps/super_glue", there, "test")]
    assert set(prints) == {"aps/super_glue/rte:train", f"aps/super_glue/{there}:test"}
    assert len(found["test"]) == 20
    assert found["test"][3].where == f"aps/super_glue/{there}:test:3"
    assert found["test"][3].prompt == "w3\nQuestion: it is True or False?\nAnswer:"
    assert [row.answer for row in found["test"][:2]] == [0, 1]


NESTED: Raw = {
    "paragraph": "Reb came.", "question": "Who?", "answer": "Reb", "label": 1,
    "idx": {"paragraph": 0, "question": 0, "answer": 0},
}  # fmt: skip


def less(row: Raw, *names: str) -> Raw:
    return {key: value for key, value in row.items() if key not in names}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", less(PAIRS[1], "idx"), "field 'idx' is missing; the row has "),
        ("rte", less(PAIRS[1], "premise"), "field 'premise' is missing; the row has "),
        ("rte", {**PAIRS[1], "premise": None}, "field 'premise' is null; expected a text"),
        ("rte", PAIRS[0], "idx 0 was that of aps/super_glue/rte:train:0 already; every row needs its own"),
        ("multirc", less(NESTED, "idx"), "'idx' is missing; found "),
        ("multirc", {**NESTED, "idx": 3}, "'idx' is int; expected dict"),
        (
            "multirc",
            {**NESTED, "idx": {"paragraph": 0, "question": 0}},
            "'answer' is missing; found paragraph, question",
        ),
        ("multirc", NESTED, "idx 0 was that of aps/super_glue/multirc:train:0 already; every row needs its own"),
        ("record", less(record_rows(RECORD)[1], "entities"), "'entities' is missing; found "),
        ("record", {**record_rows(RECORD)[1], "entities": None}, "'entities' is NoneType; expected list"),
        (
            "record",
            {**record_rows(RECORD)[1], "entities": ["Costa", None]},
            "'entities' holds NoneType; expected texts",
        ),
        ("record", {**record_rows(RECORD)[1], "answers": None}, "'answers' is NoneType; expected list"),
        (
            "record",
            {**record_rows(RECORD)[1], "answers": ["Ajax"]},
            "answer 'Ajax' is none of the article's 3 entities",
        ),
        ("record", {**record_rows(RECORD)[1], "passage": None}, "'passage' is NoneType; expected str"),
        ("record", {**record_rows(RECORD)[1], "query": "Who lost?"}, "the query has no @placeholder: 'Who lost?'"),
        ("record", {**record_rows(RECORD)[1], "idx": {"passage": 3}}, "'query' is missing; found passage"),
        ("record", record_rows(RECORD)[0], "idx 40 was that of aps/super_glue/record:train:0 already; every row needs"),
        ("wsc", {"text": "he", "span1_text": "Mark", "label": 1, "idx": 1}, "'span2_text' is missing; found "),
    ],
)
def test_bad_rows_are_refused_by_split_and_row(hub: Callable[..., Any], name: str, row: Raw, message: str) -> None:
    good = {
        "rte": PAIRS[0], "multirc": NESTED, "record": record_rows(RECORD)[0],
        "wsc": {"text": WSC["text"], **WSC["target"], "idx": 0, "label": 1},
    }  # fmt: skip
    hub([good[name], row])
    task = load_task(name)
    assert task.hub is not None
    with pytest.raises(DataError, match=f"^{task.hub.path}/{re.escape(task.hub.name)}:train:1: {re.escape(message)}"):
        hub_rows(task, "causal", 0)


def test_a_run_may_read_the_hub(hub: Callable[..., Any], run_config: Callable[..., Raw], tmp_path: Path) -> None:
    hub([{**row, "premise": "is it :", "hypothesis": f"w{i}"} for i, row in enumerate(PAIRS)])
    task = {"task": "rte", "data": "hub"}
    path = tmp_path / "c.yaml"
    path.write_text("small: gpt2\nlarge: gpt2-xl\ntask: rte\ndata: hub\n", encoding="utf-8")
    assert load_config(path).data == "hub"
    with pytest.raises(DataError, match=r"^aps/super_glue/rte:train:0: options ' True' and ' False' are the same"):
        prepare(parse_config(run_config("gpt2", **task), "test"), None)
