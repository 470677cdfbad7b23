"""Tasks as data: prompts word by word, hold-out and limits, the user's own rows, the official row counts."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import data_directory, toy_rows, write_jsonl
from plugbridge.config import TaskConfig
from plugbridge.config.document import parse_yaml
from plugbridge.errors import ConfigError, DataError
from plugbridge.tasks.form import fill, template_fields
from plugbridge.tasks.metrics import METRICS
from plugbridge.tasks.own import own_rows, own_task
from plugbridge.tasks.read import read_rows
from plugbridge.tasks.rows import Row, draw, hold_out, load_rows, make_row, refill, split_files
from plugbridge.tasks.spec import Task, load_task, parse_task, task_names

PAIR = {"premise": "It rained.", "hypothesis": "It was wet."}
CHOICE = {"premise": "He fell.", "choice1": "It was icy.", "choice2": "It was dry.", "question": "cause", "label": 0}
NEWS = {"Title": "Rain", "Description": "It rained.", "Class Index": "4"}


@pytest.mark.parametrize("name", task_names())
def test_every_shipped_task_is_whole(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert set(task.metrics) <= set(METRICS)
    assert "train" in task.files
    assert ("validation" in task.files) != (task.holdout > 0)
    assert ("test" in task.files) != (task.holdout_test > 0)
    if task.shipped:
        assert set(split_files(task, None)) == set(task.files)


def test_metrics_are_superglues() -> None:
    """In SuperGLUE's order (Wang et al. 2019, Table 1 and section 3), as the paper prints them."""
    assert {name: list(load_task(name).metrics) for name in (
        "boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "ax-b", "ax-g",
    )} == {
        "boolq": ["accuracy"], "cb": ["accuracy", "macro_f1"], "copa": ["accuracy"],
        "multirc": ["f1a", "question_match"], "record": ["squad_f1", "squad_match"], "rte": ["accuracy"],
        "wic": ["accuracy"], "wsc": ["accuracy"], "ax-b": ["matthews", "accuracy"],
        "ax-g": ["accuracy", "gender_parity"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "raw", "prompt", "options", "answer"),
    [
        ("rte", "causal", {**PAIR, "label": "not_entailment"},
         "It rained.\nQuestion: It was wet. True or False?\nAnswer:", (" True", " False"), 1),
        ("rte", "seq2seq", {**PAIR, "label": "entailment"},
         "rte sentence1: It rained. sentence2: It was wet.", ("entailment", "not_entailment"), 0),
        ("cb", "causal", {**PAIR, "hypothesis": "It was wet", "label": "neutral"},
         "It rained.\nQuestion: It was wet. True, False, or Neither?\nAnswer:", (" True", " False", " Neither"), 2),
        ("cb", "seq2seq", {**PAIR, "label": "contradiction"},
         "cb hypothesis: It was wet. premise: It rained.", ("entailment", "contradiction", "neutral"), 1),
        ("copa", "causal", CHOICE, "He fell. This happened because:", (" It was icy.", " It was dry."), 0),
        ("copa", "causal", {**CHOICE, "question": "effect", "label": 1},
         "He fell. As a result:", (" It was icy.", " It was dry."), 1),
        ("copa", "seq2seq", {**CHOICE, "label": 1},
         "copa choice1: It was icy. choice2: It was dry. premise: He fell. question: cause", ("choice1", "choice2"), 1),
        ("sst2", "causal", {"sentence": "a joy .", "label": "1"}, "a joy .\nIt was", (" bad", " good"), 1),
        ("sst2", "seq2seq", {"sentence": "a joy .", "label": "0"},
         "sst2 sentence: a joy .", ("negative", "positive"), 0),
        ("subj", "causal", {"sentence": "he runs .", "label": "1"},
         "he runs .\nThis is a", (" thought", " fact"), 1),
        ("subj", "seq2seq", {"sentence": "he runs .", "label": "0"},
         "subj sentence: he runs .", ("subjective", "objective"), 0),
        ("trec", "causal", {"question": "Where is it ?", "label": "4"}, "Where is it ?\nThe answer is a",
         (" fact", " thing", " word", " person", " place", " number"), 4),
        ("trec", "seq2seq", {"question": "Who is it ?", "label": "3"}, "trec question: Who is it ?",
         ("description", "entity", "abbreviation", "human", "location", "number"), 3),
        ("agnews", "causal", NEWS, "Rain. It rained.\nTopic:", (" world", " sports", " business", " science"), 3),
        ("agnews", "seq2seq", NEWS,
         "agnews title: Rain description: It rained.", ("world", "sports", "business", "science"), 3),
        ("agnews-alps", "causal", {"text": "It rained.", "topic": "Sci/Tech"},
         "It rained.\nTopic:", (" world", " sports", " business", " science"), 3),
        ("agnews-alps", "seq2seq", {"text": "It rained.", "topic": "World"},
         "agnews description: It rained.", ("world", "sports", "business", "science"), 0),
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
        ("rte", {**PAIR, "premise": " \n"}, "here: field 'premise' is blank; expected a text$"),
        ("rte", {**PAIR, "hypothesis": None}, "here: field 'hypothesis' is null; expected a text, a number or a truth"),
        ("copa", {**CHOICE, "choice2": ""}, "here: field 'choice2' is blank; expected a text$"),
        ("copa", {**CHOICE, "choice1": ["icy"]}, "here: field 'choice1' is a list; expected a text, a number"),
        ("copa", {**CHOICE, "question": None}, "here: question is 'None'; expected one of"),
    ],
)
def test_bad_rows_are_named(name: str, raw: dict[str, Any], message: str) -> None:
    task = load_task(name)
    with pytest.raises(DataError, match=message):
        make_row(task, task.form("causal"), "here", raw)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_question_of_neither_kind_is_refused_whatever_the_model(kind: str) -> None:
    task = load_task("copa")
    with pytest.raises(DataError, match=r"^here: question is 'why'; expected one of \['cause', 'effect'\]$"):
        make_row(task, task.form(kind), "here", {**CHOICE, "question": "why"})


def test_numbers_and_truth_values_are_written_as_json() -> None:
    raw = {"n": 3, "part": 0.5, "yes": True, "list": [1, "a"], "text": "as {it} is"}
    assert fill("{n} {part} {yes} {text} {{n}}", raw, "here") == "3 0.5 true as {it} is {n}"


@pytest.mark.parametrize(
    ("value", "fault"),
    [(None, "null"), ([], "a list"), (["a"], "a list"), ({"a": "b"}, "an object"), ("", "blank"), (" \t\n", "blank")],
)
def test_what_is_no_text_fills_no_template(value: Any, fault: str) -> None:
    with pytest.raises(DataError, match=f"^here: field 'x' is {fault}; expected a text"):
        fill("{y} {x}", {"x": value, "y": "a", "z": None}, "here")
    if fault == "blank":
        assert fill("{y} {x}.", {"x": value, "y": "a"}, "here", ["x"]) == f"a {value}."
    else:
        with pytest.raises(DataError, match=f"^here: field 'x' is {fault}"):
            fill("{y} {x}", {"x": value, "y": "a"}, "here", ["x"])


def test_refill_changes_the_passage_alone() -> None:
    task = load_task("rte")
    row = make_row(task, task.causal, "here", {**PAIR, "label": "entailment"})
    assert refill(task, task.causal, row, "It") == "It\nQuestion: It was wet. True or False?\nAnswer:"
    assert refill(task, task.causal, row, "") == "\nQuestion: It was wet. True or False?\nAnswer:"  # cut to nothing


TASK: dict[str, Any] = {
    "name": "t", "title": "t", "source": "s", "licence": "l", "folder": "f", "files": {"train": "a"}, "label": "label",
    "metrics": ["accuracy"],
}  # fmt: skip
WORDS = {"a": "x", "b": "y"}
FORM = {"causal": {"prompt": "{x}", "words": WORDS}}


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
        ({"causal": {"prompt": "{x}", "words": WORDS, "options_from": "o"}}, "give either `words` or `options`"),
        (
            {"causal": {"prompt": "{x}", "words": WORDS, "generate": "{label}"}},
            "`generate` stands alone, or with `judge`",
        ),
        ({"causal": {"prompt": "{x}", "words": WORDS, "judge": "referent"}}, "`judge` reads what a model wrote"),
        (
            {"causal": {"prompt": "{x}", "words": WORDS, "generate": "{x}", "judge": "referent"}},
            "`judge = referent` needs `words` for true and false",
        ),
        ({"causal": {"prompt": "{x}", "generate": "{x}"}}, "it must hold the label's field, {label}"),
        ({"causal": {"prompt": "{x}", "generate": "{label}", "max_new_tokens": 0}}, "t.toml: causal.max_new_tokens: "),
        ({**FORM, "unfold": "rte"}, "t.toml: unfold: Input should be 'multirc', 'record'"),
        ({**FORM, "leaderboard": {"file": "a", "shape": "b"}}, "t.toml: leaderboard.shape: Input should be 'row'"),
        ({**FORM, "format": {"name": "parallel lines", "columns": {}}}, "t.toml: format.parallel lines.columns: Dict"),
        ({}, "t.toml: causal: Field required"),
        ({**FORM, "holdout": 1.0}, "t.toml: holdout: Input should be less than 1"),
        ({**FORM, "holdout_test": -0.1}, "t.toml: holdout_test: Input should be greater than or equal to 0"),
        (
            {**FORM, "holdout": 0.1, "files": {"train": "a", "validation": "b"}},
            "^t.toml: give either `holdout` or a validation file$",
        ),
        (
            {**FORM, "holdout_test": 0.1, "files": {"train": "a", "test": "b"}},
            "^t.toml: give either `holdout_test` or a test file$",
        ),
        (
            {**FORM, "or_files": [{"test": "b"}]},
            "^t.toml: `or_files` has test; expected train, as in `files`$",
        ),
        ({**FORM, "limit": {"train": 0}}, "t.toml: limit.train: Input should be greater than 0"),
        ({**FORM, "limit": {"dev": 9}}, "t.toml: limit.dev.*: Input should be 'train', 'validation' or 'test'"),
        ({**FORM, "format": {"name": "xml"}}, "t.toml: format: Input tag 'xml' found using 'name' does not match"),
        ({**FORM, "format": {"name": "tsv"}}, "t.toml: format.tsv.columns: Field required"),
        ({**FORM, "format": {"name": "tsv", "columns": []}}, "t.toml: format.tsv.columns: Tuple should have at least"),
        ({**FORM, "format": {"name": "jsonl", "encoding": "latin-1"}}, "t.toml: format.jsonl.encoding: Extra inputs"),
        ({**FORM, "format": {"name": "csv", "columns": ["a"], "separator": "||"}}, "t.toml: format.csv.separator: "),
        (
            {**FORM, "format": {"name": "labelled lines", "columns": ["a"]}},
            "t.toml: format.labelled lines.columns.1: Field required",
        ),
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
    kept, held = hold_out(rows, 0.15, 0)
    assert (kept, held) == hold_out(list(rows), 0.15, 0)
    assert (kept, held) != hold_out(rows, 0.15, 1)
    assert (len(kept), len(held)) == (34, 6)
    assert sorted(kept + held, key=lambda r: int(r.prompt)) == rows
    for part in (kept, held):
        assert part == sorted(part, key=lambda r: int(r.prompt))
    assert [row.prompt for row in held] == ["2", "4", "11", "23", "24", "27"]
    assert len(hold_out(numbered(3), 0.01, 0)[1]) == 1


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    rows = numbered(40)
    drawn, rest = draw(rows, 12, 3)
    assert set(map(id, draw(rows, 5, 3)[0])) < set(map(id, drawn))
    assert sorted([*drawn, *rest], key=lambda r: int(r.prompt)) == rows
    assert draw(rows, 99, 3) == (rows, [])


def lines_task(tmp_path: Path, rows: dict[str, int], **keys: Any) -> Task:
    """A task of labelled lines; ``rows`` is the number of lines by split."""
    for split, count in rows.items():
        text = "".join(f"{i % 2} line {i}\n" for i in range(count))
        (tmp_path / split).write_text(text, encoding="utf-8")
    raw = {
        **TASK, "files": {split: split for split in rows},
        "format": {"name": "labelled lines", "columns": ["label", "text"]},
        "causal": {"prompt": "{text}", "words": {"0": "x", "1": "y"}}, **keys,
    }  # fmt: skip
    return parse_task(raw, "t.toml")


def texts(task: Task, data: Path, seed: int) -> dict[str, list[str]]:
    return {split: [row.prompt for row in rows] for split, rows in load_rows(task, "causal", data, seed).items()}


def test_one_file_is_held_out_twice(tmp_path: Path) -> None:
    task = lines_task(tmp_path, {"train": 100}, holdout=0.2, holdout_test=0.1)
    first, second = texts(task, tmp_path, 0), texts(task, tmp_path, 1)
    assert {split: len(found) for split, found in first.items()} == {"train": 72, "validation": 18, "test": 10}
    assert sorted(text for found in first.values() for text in found) == sorted(f"line {i}" for i in range(100))
    assert first == texts(task, tmp_path, 0)
    assert first["test"] == second["test"]  # whatever the seed: no seed tunes on another's test rows
    assert first["validation"] != second["validation"]


def test_a_limit_is_drawn_by_the_seed_but_for_test_rows(tmp_path: Path) -> None:
    files = {"train": 100, "test": 50}
    limit = {"train": 30, "validation": 5, "test": 20}
    whole = texts(lines_task(tmp_path, files, holdout=0.1), tmp_path, 1)
    task = lines_task(tmp_path, files, holdout=0.1, limit=limit)
    first, second = texts(task, tmp_path, 0), texts(task, tmp_path, 1)
    assert {split: len(found) for split, found in first.items()} == limit
    for split, found in second.items():
        assert found == [text for text in whole[split] if text in set(found)]  # in the file's order
    assert first["test"] == second["test"]
    assert first["train"] != second["train"]
    assert first["validation"] != second["validation"]


def test_a_limit_above_the_rows_leaves_them_all(tmp_path: Path) -> None:
    files = {"train": 9, "validation": 2, "test": 4}
    task = lines_task(tmp_path, files, limit={"train": 9, "test": 5})
    assert texts(task, tmp_path, 3) == texts(lines_task(tmp_path, files), tmp_path, 0)


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^task 't': split 'validation' is empty \(held out\)$"):
        load_rows(lines_task(tmp_path, {"train": 9, "test": 4}, limit={"validation": 5}), "causal", tmp_path, 0)
    with pytest.raises(DataError, match=r"^task 't': split 'test' is empty \(.*/test\)$"):
        load_rows(lines_task(tmp_path, {"train": 9, "test": 0}, holdout=0.1), "causal", tmp_path, 0)


def test_rows_that_are_all_held_out_are_told(tmp_path: Path) -> None:
    held = (
        r"^task 't': .*/train has 1 row, of which validation rows are held out, and none is left to train on; it needs"
    )
    with pytest.raises(DataError, match=held):
        load_rows(lines_task(tmp_path, {"train": 1, "test": 4}, holdout=0.1), "causal", tmp_path, 0)
    with pytest.raises(DataError, match=r"/train has 2 rows, of which validation and test rows are held out, and none"):
        load_rows(lines_task(tmp_path, {"train": 2}, holdout=0.1, holdout_test=0.1), "causal", tmp_path, 0)


def test_later_keys_do_not_touch_the_digest_of_a_task_without_them() -> None:
    old = {
        "name", "title", "source", "licence", "folder", "shipped", "files", "holdout", "label", "passage", "metrics",
        "causal", "seq2seq",
    }  # fmt: skip
    assert set(load_task("rte").model_dump(mode="json")) == old
    assert set(load_task("subj").model_dump(mode="json")) == old | {"format", "holdout_test"}
    assert set(load_task("sst2").model_dump(mode="json")) == old | {"format", "limit"}
    assert set(load_task("record").model_dump(mode="json")) == old | {"unfold", "group"}
    assert set(load_task("multirc").model_dump(mode="json")) == old | {"unfold", "group"}
    forms = {"prompt", "prompts", "prompt_by", "words", "options"}
    assert load_task("rte").causal.model_dump(mode="json").keys() == forms | {"score"}  # which was the mean
    assert set(load_task("copa").causal.model_dump(mode="json")) == forms
    assert set(load_task("record").causal.model_dump(mode="json")) == forms | {"options_from", "option"}
    assert set(load_task("wsc").form("seq2seq").model_dump(mode="json")) == forms | {
        "generate", "judge", "max_new_tokens",
    }  # fmt: skip
    assert set(load_task("cola").model_dump(mode="json")) == old | {"format"}
    assert set(load_task("agnews").model_dump(mode="json")["format"]) == {
        "name", "columns", "separator", "header", "encoding",
    }  # fmt: skip
    assert set(load_task("sst2").model_dump(mode="json")["format"]) == {"name", "columns", "header", "encoding"}


def test_one_file_of_own_rows_is_split_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [{**row, "word": f"{i}"} for i, row in enumerate(toy_rows(50, 0))])
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


@pytest.mark.parametrize("answer", [{"words": {"even": "yes", "odd": "no"}}, {"generate": " {label}"}])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"label": None}, "field 'label' is null; expected a label"),
        ({"word": None}, "field 'word' is null; expected a text, a number or a truth value"),
        ({"word": ["w1"]}, "field 'word' is a list; expected a text, a number or a truth value"),
        ({"word": ""}, "field 'word' is blank; expected a text"),
    ],
)
def test_bad_own_rows_are_refused_by_file_and_line(
    tmp_path: Path, bad: dict[str, Any], message: str, answer: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [*toy_rows(20, 0), {"word": "w1", "label": "odd", **bad}])
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{word}", **answer})
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:21: {message}')}$"):
        own_rows(config, own_task(config), "causal", 0)


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [{"word": f"w{i}", "label": i % 2} for i in range(20)])
    raw = parse_yaml(f"{{file: {path}, prompt: '{{word}}', words: {{0: ' no', 1: ' yes'}}}}", "c.yaml")
    config = TaskConfig.model_validate(raw)
    rows, _ = own_rows(config, own_task(config), "causal", 0)
    assert all(row.answer == row.fields["label"] for row in rows["train"])
    assert {row.answer for row in rows["train"]} == {0, 1}


@pytest.mark.parametrize("layout", [".", "RTE", "superglue/RTE"])
def test_files_are_found_in_any_usual_place(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    for name in ("train", "val"):
        write_jsonl(tmp_path / layout / f"{name}.jsonl", [{**PAIR, "label": "entailment", "idx": i} for i in range(10)])
    rows = load_rows(load_task("rte"), "causal", tmp_path, seed=0)
    assert {split: len(found) for split, found in rows.items()} == {"test": 10, "train": 9, "validation": 1}


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("sst2", [".", "SST-2", "glue/SST-2"]),
        ("cola", [".", "CoLA", "glue/CoLA", "CoLA/original/raw", "glue/CoLA/original/raw"]),
        ("subj", [".", "sentence_classification"]),
        ("trec", [".", "sentence_classification"]),
        ("agnews", [".", "agnews", "sentence_classification/agnews"]),
        ("agnews-alps", [".", "agnews", "sentence_classification/agnews"]),
    ],
)
def test_folders_of_tasks_from_local_files(tmp_path: Path, name: str, layouts: list[str]) -> None:
    task = load_task(name)
    for i, layout in enumerate(layouts):
        folder = tmp_path / str(i) / layout
        folder.mkdir(parents=True)
        for file in task.files.values():
            (folder / file).touch()
        assert split_files(task, tmp_path / str(i)) == {split: folder / file for split, file in task.files.items()}


GLUE_ROWS = {
    "cola": "gj04\t1\t\tThey run \"far\".\ngj04\t0\t*\tThey runs.\n" * 5,
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t2\t3\tThey \"run\".\tThey run.\n" * 9,
    "agnews": '"3","Rain ""falls""","It rained, at last."\n' * 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "folder", "files", "prompt"),
    [
        ("cola", "CoLA", ("train.tsv", "dev.tsv"), 'They run "far".\nIs this'),
        ("mrpc", "glue/MRPC", ("train.tsv", "dev.tsv"), 'They "run".\nThey run.\nQuestion'),
        ("agnews", "agnews", ("train.csv", "test.csv"), 'Rain "falls". It rained, at last.\nTopic:'),
    ],
)
def test_other_distributions(tmp_path: Path, name: str, folder: str, files: tuple[str, str], prompt: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for file in files:
        (tmp_path / folder / file).write_text(GLUE_ROWS[name], encoding="utf-8")
    task = load_task(name)
    rows = load_rows(task, "causal", tmp_path, 0)
    assert rows["test"][0].prompt.startswith(prompt)
    assert f"{tmp_path}/{folder}/{files[1]}:" in rows["test"][0].where
    if task.or_files:
        for file in task.files.values():
            (tmp_path / folder / file).touch()
        assert list(split_files(task, tmp_path).values()) == [tmp_path / folder / n for n in task.files.values()]


def test_files_that_are_nowhere(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").touch()
    message = f"{tmp_path}/SST-2 does not hold train.tsv, dev.tsv, nor does {tmp_path}/glue/SST-2, nor does {tmp_path}"
    with pytest.raises(DataError, match=f"^task 'sst2': {re.escape(message)}$"):
        split_files(load_task("sst2"), tmp_path)
    with pytest.raises(DataError, match=r"a directory that holds SST-2/train\.tsv$"):
        split_files(load_task("sst2"), None)
    wanted = "msr_paraphrase_train.txt, msr_paraphrase_test.txt or train.tsv, dev.tsv"
    with pytest.raises(DataError, match=f"^task 'mrpc': {tmp_path}/MRPC does not hold {wanted}, nor does "):
        split_files(load_task("mrpc"), tmp_path)


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "kind", "counts", "labels"),
    [
        ("rte", "causal", {"train": 2241, "validation": 249, "test": 277}, {0, 1}),  # 2490 and 277
        ("cb", "seq2seq", {"train": 212, "validation": 38, "test": 56}, {0, 1, 2}),  # 250 and 56
        ("copa", "causal", {"train": 340, "validation": 60, "test": 100}, {0, 1}),  # 400 and 100
        ("sst2", "seq2seq", {"train": 4000, "validation": 600, "test": 872}, {0, 1}),  # limited
        ("subj", "causal", {"train": 8100, "validation": 900, "test": 1000}, {0, 1}),  # 10000
        ("trec", "seq2seq", {"train": 4907, "validation": 545, "test": 500}, set(range(6))),  # 5452 and 500
        ("agnews-alps", "causal", {"train": 4000, "validation": 600, "test": 1000}, set(range(4))),  # limited
    ],
)
def test_official_files(name: str, kind: str, counts: dict[str, int], labels: set[int]) -> None:
    task = load_task(name)
    rows = load_rows(task, kind, data_directory(), seed=0)
    assert {split: len(found) for split, found in rows.items()} == counts
    for found in rows.values():
        assert {row.answer for row in found} == labels
        assert all(row.prompt and not any(f"{{{name}}}" in row.prompt for name in row.fields) for row in found)
    held = {row.where for row in rows["validation"]}
    assert held.isdisjoint(row.where for row in rows["train"])
    assert all(f"{task.files['train']}:" in where for where in held)
    assert {row.where for row in rows["test"]}.isdisjoint({*held, *(row.where for row in rows["train"])})


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "file", "counts"),
    [
        ("sst2", "glue/SST-2/train.tsv", {"0": 29780, "1": 37569}),
        ("sst2", "glue/SST-2/dev.tsv", {"0": 428, "1": 444}),
        ("subj", "sentence_classification/subj.all", {"0": 5000, "1": 5000}),
        ("trec", "sentence_classification/TREC.train.all",  # Li and Roth's DESC, ENTY, ABBR, HUM, LOC, NUM
         {"0": 1162, "1": 1250, "2": 86, "3": 1223, "4": 835, "5": 896}),
        ("trec", "sentence_classification/TREC.test.all", {"0": 138, "1": 94, "2": 9, "3": 65, "4": 81, "5": 113}),
        ("agnews", "sentence_classification/agnews/train.csv", dict.fromkeys("1234", 30000)),
        ("agnews", "sentence_classification/agnews/test.csv", dict.fromkeys("1234", 1900)),
        ("agnews-alps", "sentence_classification/agnews/alps_dev.tsv",
         {"World": 2509, "Sports": 2458, "Business": 2496, "Sci/Tech": 2538}),
        ("agnews-alps", "sentence_classification/agnews/alps_test.tsv",
         dict.fromkeys(("World", "Sports", "Business", "Sci/Tech"), 1900)),
    ],
)  # fmt: skip
def test_classes_of_the_official_files(name: str, file: str, counts: dict[str, int]) -> None:
    path = data_directory() / file
    if not path.is_file():
        pytest.skip(f"the data directory does not hold {file}")
    task = load_task(name)
    assert Counter(row[task.label] for _, row in read_rows(path, task.format)) == counts


@pytest.mark.needs_data
def test_films_are_written_in_windows_letters() -> None:
    rows = dict(read_rows(data_directory() / "sentence_classification" / "subj.all", load_task("subj").format))
    sentences = {where.rpartition(":")[2]: row["sentence"] for where, row in rows.items()}
    assert "moli\u00e8re" in sentences["85"]
    assert "\u2013 helps make" in sentences["41"]
    assert "\u2026 and bowling" in sentences["140"]


@pytest.mark.needs_data
def test_the_hold_out_of_real_rows_follows_the_seed() -> None:
    def held(seed: int) -> list[str]:
        return [row.where for row in load_rows(load_task("copa"), "causal", data_directory(), seed)["validation"]]

    assert held(0) == held(0)
    assert held(0) != held(1)


def test_how_options_are_ranked() -> None:
    """Fixed words by the sum; the options that COPA's and ReCoRD's rows bring by the mean; T5's COPA has words."""
    for name in task_names():
        task = load_task(name)
        for kind in ("causal", "seq2seq"):
            own = name in ("copa", "record") and kind == "causal"
            assert task.form(kind).decision == ("mean" if own else "sum"), (name, kind)
    raw = {"file": "f", "prompt": "{x}", "words": {"a": " a", "b": " b"}}
    ranks = [own_task(TaskConfig.model_validate({**raw, **more})).causal.decision for more in ({}, {"score": "first"})]
    assert ranks == ["sum", "first"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": {"a": " a"}}, "`words` has no two labels, so there is nothing to choose; give at least two"),
        ({"max_new_tokens": 5}, "`max_new_tokens` is for texts that are written; it needs `generate`"),
        ({"words": None, "generate": "{label}", "score": "sum"}, "`score` ranks options; it does not go with"),
        ({"score": "product"}, "Input should be 'sum', 'mean' or 'first'"),
    ],
)
def test_keys_of_own_rows_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    raw = {"file": "f", "prompt": "{x}", "words": {"a": " a", "b": " b"}, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskConfig.model_validate(raw)
