"""Tasks as data: prompts word by word, hold-out, the user's own rows, the official row counts."""

from pathlib import Path
from typing import Any

import pytest

from conftest import data_directory, toy_rows, write_jsonl
from plugbridge.config import TaskConfig
from plugbridge.errors import ConfigError, DataError
from plugbridge.tasks.metrics import METRICS
from plugbridge.tasks.own import own_rows, own_task
from plugbridge.tasks.spec import (
    Row,
    fill,
    hold_out,
    load_rows,
    load_task,
    make_row,
    parse_task,
    read_jsonl,
    refill,
    split_files,
    task_names,
    template_fields,
)

PAIR = {"premise": "It rained.", "hypothesis": "It was wet."}
CHOICE = {"premise": "He fell.", "choice1": "It was icy.", "choice2": "It was dry.", "question": "cause", "label": 0}


@pytest.mark.parametrize("name", task_names())
def test_every_shipped_task_is_whole(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert set(task.metrics) <= set(METRICS)
    assert {"train", "test"} <= set(task.files)
    assert "validation" in task.files or task.holdout > 0
    if task.shipped:
        assert set(split_files(task, None)) == set(task.files)


@pytest.mark.parametrize(
    ("name", "kind", "raw", "prompt", "options", "answer"),
    [
        ("rte", "causal", {**PAIR, "label": "not_entailment"},
         "It rained.\nQuestion: It was wet. True or False?\nAnswer:", (" True", " False"), 1),
        ("rte", "seq2seq", {**PAIR, "label": "entailment"},
         "rte premise: It rained. hypothesis: It was wet.", ("entailment", "not_entailment"), 0),
        ("cb", "causal", {**PAIR, "label": "neutral"},
         "It rained.\nQuestion: It was wet. True, False, or Neither?\nAnswer:", (" True", " False", " Neither"), 2),
        ("cb", "seq2seq", {**PAIR, "label": "contradiction"},
         "cb hypothesis: It was wet. premise: It rained.", ("entailment", "contradiction", "neutral"), 1),
        ("copa", "causal", CHOICE, "He fell. This happened because:", (" It was icy.", " It was dry."), 0),
        ("copa", "causal", {**CHOICE, "question": "effect", "label": 1},
         "He fell. As a result:", (" It was icy.", " It was dry."), 1),
        ("copa", "seq2seq", {**CHOICE, "label": 1},
         "copa choice1: It was icy. choice2: It was dry. premise: He fell. question: cause", ("choice1", "choice2"), 1),
    ],
)  # fmt: skip
def test_prompts_word_by_word(
    name: str, kind: str, raw: dict[str, Any], prompt: str, options: tuple[str, ...], answer: int
) -> None:
    task = load_task(name)
    assert make_row(task, task.form(kind), "here", raw) == Row(prompt, options, answer, raw, "here")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("copa", {**CHOICE, "label": 2}, r"here: label '2' is not the number of an option \(0 to 1\)"),
        ("copa", {**CHOICE, "label": "²"}, "here: label '²' is not the number of an option"),
        ("copa", {**CHOICE, "label": "first"}, "here: label 'first' is not the number of an option"),
        ("copa", {**CHOICE, "question": "why"}, r"here: question is 'why'; expected one of \['cause', 'effect'\]"),
        ("copa", {k: v for k, v in CHOICE.items() if k != "choice2"}, "here: field 'choice2' is missing"),
        ("rte", {**PAIR, "label": "neutral"}, "here: label 'neutral' has no label word; known labels: entailment,"),
        ("rte", {}, "here: field 'premise' is missing; the row has none"),
    ],
)
def test_bad_rows_are_named(name: str, raw: dict[str, Any], message: str) -> None:
    task = load_task(name)
    with pytest.raises(DataError, match=message):
        make_row(task, task.form("causal"), "here", raw)


def test_values_that_are_not_text_are_written_as_json() -> None:
    raw = {"n": 3, "yes": True, "list": [1, "a"], "text": "as {it} is"}
    assert fill("{n} {yes} {list} {text} {{n}}", raw, "here") == '3 true [1, "a"] as {it} is {n}'


def test_refill_changes_the_passage_alone() -> None:
    task = load_task("rte")
    row = make_row(task, task.causal, "here", {**PAIR, "label": "entailment"})
    assert refill(task, task.causal, row, "It") == "It\nQuestion: It was wet. True or False?\nAnswer:"


TASK: dict[str, Any] = {
    "name": "t", "title": "t", "source": "s", "licence": "l", "folder": "f", "files": {"train": "a"}, "label": "label",
    "metrics": ["accuracy"],
}  # fmt: skip
WORDS = {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": {"prompt": "{x}", "words": WORDS}, "colour": "red"}, "t.toml: colour: Extra inputs"),
        ({"causal": {"words": WORDS}}, "t.toml: causal: give either `prompt` or `prompts`"),
        ({"causal": {"prompt": "{x}"}}, "t.toml: causal: give either `words` or `options`"),
        ({"causal": {"prompt": "{x}", "words": WORDS, "options": ["a"]}}, "give either `words` or `options`"),
        ({"causal": {"prompts": {"a": "{x}"}, "words": WORDS}}, "`prompts` and `prompt_by` go together"),
        ({"causal": {"prompt": "{x}", "words": {"a": ""}}}, "the label word of 'a' is empty"),
        ({"causal": {"prompt": "{x}", "words": {"a": "x", "b": "x"}}}, "'a' and 'b' have the same word 'x'"),
        ({}, "t.toml: causal: Field required"),
    ],
)
def test_a_task_file_is_read_strictly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_task({**TASK, **changes}, "t.toml")


@pytest.mark.parametrize("template", ["{a", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "a}"])
def test_templates_hold_plain_fields_only(template: str) -> None:
    with pytest.raises(ConfigError, match="prompt template"):
        template_fields(template)


def numbered(count: int) -> list[Row]:
    return [Row(str(i), ("a", "b"), 0, {}, f"f:{i}") for i in range(count)]


def test_hold_out_is_drawn_by_the_seed_and_loses_nothing() -> None:
    rows = numbered(40)
    split = hold_out(rows, 0.15, 0, has_validation=False)
    assert split == hold_out(list(rows), 0.15, 0, has_validation=False)
    assert split != hold_out(rows, 0.15, 1, has_validation=False)
    assert (len(split["train"]), len(split["validation"])) == (34, 6)
    assert sorted(split["train"] + split["validation"], key=lambda r: int(r.prompt)) == rows
    for part in split.values():
        assert part == sorted(part, key=lambda r: int(r.prompt))
    assert hold_out(rows, 0.15, 0, has_validation=True) == {"train": rows}
    assert len(hold_out(numbered(3), 0.01, 0, has_validation=False)["validation"]) == 1


def test_jsonl_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \r\n{"a": "\u2028"}', encoding="utf-8")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [
        (f"{tmp_path}/a.jsonl:1", {"a": 1}),
        (f"{tmp_path}/a.jsonl:4", {"a": "\u2028"}),
    ]


def test_one_file_of_own_rows_is_split_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", toy_rows(50, 0))
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{word}", "words": {"even": "yes", "odd": "no"}})

    def where(seed: int) -> dict[str, list[str]]:
        splits, paths = own_rows(config, own_task(config), "causal", seed)
        assert paths == {"file": path}
        return {split: [row.where for row in rows] for split, rows in splits.items()}

    splits = where(0)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 5, "test": 5}
    assert len({line for rows in splits.values() for line in rows}) == 50
    assert splits == where(0)
    assert splits != where(1)


@pytest.mark.parametrize("layout", [".", "RTE", "superglue/RTE"])
def test_files_are_found_in_any_usual_place(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    for name in ("train", "val"):
        write_jsonl(tmp_path / layout / f"{name}.jsonl", [{**PAIR, "label": "entailment"}] * 10)
    rows = load_rows(load_task("rte"), "causal", tmp_path, seed=0)
    assert {split: len(found) for split, found in rows.items()} == {"test": 10, "train": 9, "validation": 1}


@pytest.mark.needs_data
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    ("name", "counts", "labels"),
    [
        ("rte", {"train": 2241, "validation": 249, "test": 277}, {0, 1}),  # 2490 and 277
        ("cb", {"train": 212, "validation": 38, "test": 56}, {0, 1, 2}),  # 250 and 56
        ("copa", {"train": 340, "validation": 60, "test": 100}, {0, 1}),  # 400 and 100
    ],
)
def test_official_files(name: str, counts: dict[str, int], labels: set[int], kind: str) -> None:
    rows = load_rows(load_task(name), kind, data_directory(), seed=0)
    assert {split: len(found) for split, found in rows.items()} == counts
    for found in rows.values():
        assert {row.answer for row in found} == labels
        assert all(row.prompt and "{" not in row.prompt for row in found)
    held = {row.where for row in rows["validation"]}
    assert held.isdisjoint(row.where for row in rows["train"])
    assert all("train.jsonl" in where for where in held)


@pytest.mark.needs_data
def test_the_hold_out_of_real_rows_follows_the_seed() -> None:
    def held(seed: int) -> list[str]:
        return [row.where for row in load_rows(load_task("copa"), "causal", data_directory(), seed)["validation"]]

    assert held(0) == held(0)
    assert held(0) != held(1)
