"""Rows that tell before any model is there that a task cannot work, and own rows' splits."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from plugbridge.config import TaskConfig, parse_config
from plugbridge.errors import ConfigError, DataError, PlugbridgeError
from plugbridge.tasks.check import check_rows
from plugbridge.tasks.own import own_rows, own_task

Raw = dict[str, Any]
WORDS = {"a": " yes", "b": " no"}


def rows_of(*texts: str, label: str = "ab") -> list[Raw]:
    return [{"text": text, "label": label[i % len(label)]} for i, text in enumerate(texts)]


def checked(tmp_path: Path, train: list[Raw], validation: list[Raw], test: list[Raw], **task: Any) -> list[str]:
    files = {"train": train, "validation": validation, "test": test}
    paths = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()}
    answer = {} if {"generate", "options"} & task.keys() else {"words": WORDS}
    config = TaskConfig.model_validate({"prompt": "{text}:", **answer, **paths, **task})
    made = own_task(config)
    rows, _ = own_rows(config, made, "causal", 0)
    return check_rows(made, "causal", rows)


SOME, MORE, REST = rows_of("p", "q", "r"), rows_of("s", "t"), rows_of("u", "v", "w")


def test_rows_with_which_all_is_well_give_no_line(tmp_path: Path) -> None:
    assert checked(tmp_path, SOME, MORE, REST) == []
    assert checked(tmp_path, SOME[:1], MORE[:1], REST[:1]) == []  # one row is no sign of anything


@pytest.mark.parametrize(
    ("train", "validation", "test", "message"),
    [
        (rows_of("p", "p", "p"), MORE, REST, "task 'own': all 3 train rows read alike, 'p:'; nothing can be learnt"),
        (SOME, REST, REST, "validation and test hold the same 3 rows; a score on rows that were trained or chosen on"),
        (REST, MORE, REST, "train and test hold the same 3 rows"),
        (SOME, SOME, REST, "train and validation hold the same 3 rows"),
    ],
)  # fmt: skip
def test_rows_that_cannot_tell_anything_are_refused(
    tmp_path: Path, train: list[Raw], validation: list[Raw], test: list[Raw], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        checked(tmp_path, train, validation, test)


def test_rows_on_both_sides_of_a_split_are_counted(tmp_path: Path) -> None:
    again = [*SOME[:2], *MORE[:1], *REST]
    assert checked(tmp_path, SOME, MORE, again) == [
        "2 of 6 test rows ask what a train row asks, word by word",
        "1 of 6 test rows ask what a validation row asks, word by word",
    ]
    listed = [{**row, "options": ["a", "b", row["text"]]} for row in SOME]
    moved = [{**row, "options": ["b", "a", row["text"]]} for row in SOME]
    same = {"options": "options", "prompt": "{text}:"}
    assert checked(tmp_path, listed, [{**row, "options": ["a", "b"]} for row in MORE], moved, **same) == []


def test_an_answer_that_is_always_the_same_is_said(tmp_path: Path) -> None:
    assert checked(tmp_path, rows_of("p", "q", label="b"), MORE, REST) == ["every train row's answer is 'no'"]
    written = [{"text": text, "label": "x"} for text in "pq"]
    assert checked(tmp_path, written, MORE, REST, generate=" {label}") == ["every train row's answer is 'x'"]


def test_rows_of_one_option_are_refused(tmp_path: Path) -> None:
    one = [[{"text": text, "options": ["a"], "label": "a"}] for text in "pqr"]
    with pytest.raises(DataError, match="every row has one option, so there is nothing to choose"):
        checked(tmp_path, *one, options="options")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"prompt": "Topic:"}, "task.prompt is 'Topic:', without a field, so all rows would be alike; put a field"),
        (
            {"prompt": "{text} {label}:"},
            r"task.prompt has the label in it, \{label\}: the model would be told the answer",
        ),
        ({"prompt": "{text} {y}:", "label": "y"}, r"task.prompt has the label in it, \{y\}"),
        ({"passage": "body"}, "task.passage is 'body', which task.prompt does not name; only a part"),
        ({"validation": "same.jsonl", "test": "./same.jsonl"}, "task: validation and test are the same file, ./same"),
        ({"train": "same.jsonl", "test": "same.jsonl"}, "task: train and test are the same file, same.jsonl; a score"),
    ],
)
def test_prompts_and_files_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Raw, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", SOME)) for name in ("train", "validation", "test", "same")
    }
    files.pop("same")
    config = TaskConfig.model_validate({"prompt": "{text}:", "words": WORDS, **files, **task})
    with pytest.raises(ConfigError, match=message):
        own_rows(config, own_task(config), "causal", 0)


def test_rows_of_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    texts = [f"t{i % 60}" for i in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(*texts, label="ab"))
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", "words": WORDS})
    for seed in range(5):
        splits, _ = own_rows(config, own_task(config), "causal", seed)
        prompts = {split: {row.prompt for row in rows} for split, rows in splits.items()}
        assert not prompts["train"] & (prompts["test"] | prompts["validation"])
        assert not prompts["validation"] & prompts["test"]
        counts = Counter({split: len(rows) for split, rows in splits.items()})
        assert sum(counts.values()) == 200
        assert abs(counts["train"] - 160) <= 4
        assert min(counts["validation"], counts["test"]) >= 12


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        (
            rows_of(*["x"] * 10),
            {},
            "task 'own': all 10 rows of {path} read alike, 'x:'; nothing can be learnt from them",
        ),
        (
            rows_of(*["x"] * 10, label="a"),
            {"words": None, "generate": " {label}"},
            "task 'own': all 10 rows of {path} read",
        ),
        (
            rows_of(*["x"] * 9, "y"),
            {},
            "task: {path} has 10 rows of 2 prompts, and rows of one prompt stay in one split; training, validation and "
            "test need a prompt each: add rows, or name a file for each",
        ),
        (rows_of("x", "y"), {}, "task: {path} has 2 rows; training, validation and test need a prompt each"),
        (rows_of("x"), {}, "task: {path} has 1 row; training"),
        ([], {}, "task: {path} has 0 rows; training"),
        (
            [{"text": "x", "o": [f"{i}", "no"], "label": 0} for i in range(9)],
            {"words": None, "options": "o"},
            "task: {path} has 9 rows of 1 prompt, and rows of one prompt stay in one split",
        ),
    ],
)
def test_rows_of_one_file_of_which_no_three_splits_can_be_made(
    tmp_path: Path, rows: list[Raw], task: Raw, message: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"file": str(path), "prompt": "{text}:", "words": WORDS, **task}
    config = TaskConfig.model_validate({key: value for key, value in given.items() if value is not None})
    with pytest.raises(DataError) as caught:
        own_rows(config, own_task(config), "causal", 0)
    assert str(caught.value).startswith(message.format(path=path))


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        (["x"] * 900 + [f"t{i}" for i in range(99)], (933, 33, 33)),  # of the others a third each
        (["x"] * 600 + [f"t{i}" for i in range(400)], (800, 100, 100)),  # as asked
        (["x"] * 30 + ["y"] * 30 + ["z"] * 30, (30, 30, 30)),
        (["x"] * 98 + ["y", "z"], (98, 1, 1)),
        (["x", "y", "z"], (1, 1, 1)),
        ([f"t{i}" for i in range(7)], (5, 1, 1)),
    ],
)
def test_a_prompt_of_many_rows_leaves_no_split_empty(
    tmp_path: Path, texts: list[str], sizes: tuple[int, int, int]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(*texts))
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", "words": WORDS})
    for seed in range(4):
        splits, _ = own_rows(config, own_task(config), "causal", seed)
        assert tuple(len(splits[split]) for split in ("train", "validation", "test")) == sizes
        prompts = [{row.prompt for row in rows} for rows in splits.values()]
        assert sum(map(len, prompts)) == len(set.union(*prompts))
        assert Counter(row.where for rows in splits.values() for row in rows) == Counter(
            f"{path}:{i + 1}" for i in range(len(texts))
        )


def test_a_split_that_is_far_from_its_size_is_said(tmp_path: Path) -> None:
    texts = [*["x"] * 920, *(f"t{i}" for i in range(80))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(*texts))
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", "words": WORDS})
    made = own_task(config)
    rows, _ = own_rows(config, made, "causal", 0)
    (line,) = check_rows(made, "causal", rows)
    assert line == (
        "rows of one prompt stay together, and some prompts have many: 946 train, 27 validation, 27 test rows"
    )


NUL = "rows.jsonl:2: field 'text': 'a.x00b' has a NUL character, which no name or prompt may have"


@pytest.mark.parametrize(
    ("raw", "task", "message"),
    [
        ({"text": "a\0b", "label": "a"}, {"words": WORDS}, NUL),
        ({"text": "a\0b", "label": "a"}, {"generate": " {label}"}, NUL),
        ({"text": "a", "label": "x\0"}, {"generate": " {label}"}, "field 'label': 'x.x00' has a NUL"),
        ({"text": "a", "label": "a\0"}, {"words": WORDS}, "label 'a.x00' has no label word"),
        ({"text": "a", "label": "b", "o": ["b", "c\0"]}, {"options": "o"}, "field 'option': 'c.x00' has a NUL"),
        ({"text": "a", "label": "a", "id": "1\0"}, {"words": WORDS, "id": "id"}, "id: '1.x00' has a NUL"),
    ],
)
def test_a_nul_is_in_no_text(tmp_path: Path, raw: Raw, task: Raw, message: str) -> None:
    good = {"text": "t", "label": "a", "o": ["a", "b"], "id": "0"}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, raw])
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", **task})
    with pytest.raises(DataError, match=message):
        own_rows(config, own_task(config), "causal", 0)


def test_a_nul_in_a_field_that_is_not_read_is_nobodys_business(tmp_path: Path) -> None:
    assert checked(tmp_path, [{**row, "more": "\0"} for row in SOME], MORE, REST) == []


def test_other_odd_characters_are_kept_and_counted(tmp_path: Path) -> None:
    odd = rows_of("a\tb\nc", "d\x07", "\x85e", "f\ufffd", "é\u200d", "\x1b[2J")
    assert checked(tmp_path, SOME, MORE, odd) == [
        f"4 of 11 rows have control characters or U+FFFD, the first U+0007 at {tmp_path / 'test.jsonl'}:2; models are "
        "given them as they are"
    ]


LONG = "n" * 5000


@pytest.mark.parametrize(
    ("task", "raw"),
    [
        ({"prompt": f"{{{LONG}}}:"}, {}),
        ({"label": LONG}, {}),
        ({"label": LONG, "prompt": f"{{text}} {{{LONG}}}:"}, {}),
        ({"passage": LONG}, {}),
        ({"id": LONG}, {}),
        ({"id": "id"}, {"id": LONG}),
        ({"prompt": LONG}, {}),
        ({"prompt": f"{{{LONG}"}, {}),
        ({"words": {LONG: " x", "b": " x"}}, {}),
        ({"words": {"a": LONG, "b": LONG}}, {}),
        ({"words": {LONG: " x", "b": " y"}}, {}),
        ({}, {"label": LONG}),
        ({"options": "o", "words": None}, {"o": ["a", "b"], "label": LONG}),
        ({"options": LONG, "words": None}, {}),
        ({"options": "o", "words": None}, {"o": [], "label": "a"}),
        ({"options": "o", "words": None}, {"o": ["a"], "label": 10**4000}),
        ({"options": "o", "option": LONG, "words": None}, {}),
        ({"generate": LONG, "words": None}, {}),
        ({"metrics": [LONG]}, {}),
    ],
)
def test_long_texts_of_users_are_cut_in_messages(tmp_path: Path, task: Raw, raw: Raw) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "t", "label": "a", LONG: 1, **raw}] * 3)
    given = {"file": str(path), "prompt": "{text}:", "words": WORDS, **task}
    raw_config = {"small": "s", "large": "l", "task": {k: v for k, v in given.items() if v is not None}}

    def read() -> None:
        config: Any = parse_config(raw_config, "c.yaml").task
        own_rows(config, own_task(config), "causal", 0)

    with pytest.raises(PlugbridgeError) as caught:
        read()
    assert len(str(caught.value)) < 700


def choice(label: Any, options: Any = ("one", "two", "three")) -> Raw:
    return {"text": "q", "options": list(options), "label": label}


@pytest.mark.parametrize(
    ("raw", "options", "right"),
    [
        (choice("two"), (" one", " two", " three"), (1,)),
        (choice(2), (" one", " two", " three"), (2,)),
        (choice(["three", "one"]), (" one", " two", " three"), (2, 0)),
        (choice(2, ("one", "one", "two")), (" one", " two"), (1,)),  # an option that is there twice is one option
        (choice("4", ("3", "4")), (" 3", " 4"), (1,)),
        (choice(1, ("0", "1")), (" 0", " 1"), (1,)),
        (choice(0, ("3", "4")), (" 3", " 4"), (0,)),
    ],
)
def test_rows_bring_their_own_options(
    tmp_path: Path, raw: Raw, options: tuple[str, ...], right: tuple[int, ...]
) -> None:
    """The label is the right option's text, several such texts, or its number from 0."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{**raw, "text": f"{i}"} for i in range(10)])
    config = TaskConfig.model_validate(
        {"file": str(path), "prompt": "{text}:", "options": "options", "option": " {option}", "metrics": ["accuracy"]}
    )
    task = own_task(config)
    assert (task.metrics, task.causal.decision) == (("accuracy",), "mean")
    rows, _ = own_rows(config, task, "causal", 0)
    row = rows["train"][0]
    assert (row.options, (row.answer, *row.also)) == (options, right)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (choice(3), r"rows.jsonl:1: label 3 is not the number of an option \(0 to 2\)"),
        (choice(-1), "label -1 is not the number"),
        (
            choice(1, ("1", "2")),
            "label 1 is an option's number and another option's text; give the right option's text",
        ),
        (choice("four"), "answer 'four' is none of the row's 3 options"),
        (choice(None), "field 'label' is null"),
        (choice("one", ()), "field 'options' is an empty list; expected at least one text"),
        ({"text": "q", "label": "one"}, "field 'options' is missing"),
    ],
)
def test_labels_that_are_no_option(tmp_path: Path, raw: Raw, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [raw] * 10)
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", "options": "options"})
    with pytest.raises(DataError, match=message):
        own_rows(config, own_task(config), "causal", 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"words": WORDS}, "give either `words`, `options` or `generate`"),
        ({"options": None, "words": WORDS, "option": " {option}"}, "it needs `options`"),
    ],
)
def test_keys_that_do_not_go_with_options(more: Raw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate({"file": "f", "prompt": "{text}:", "options": "options", **more})


def test_an_option_without_its_text_and_metrics_of_classes_are_refused() -> None:
    raw = {"file": "f", "prompt": "{text}:", "options": "options"}
    with pytest.raises(ConfigError, match=r"`option` is ' x'; it must hold \{option\}, the option's text"):
        own_task(TaskConfig.model_validate({**raw, "option": " x"}))
    with pytest.raises(ConfigError, match="no metric 'macro_f1' for such answers; known: accuracy"):
        own_task(TaskConfig.model_validate({**raw, "metrics": ["macro_f1"]}))


def test_own_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "key": i % 9} for i, row in enumerate(rows_of(*"abcdefghij"))])
    config = TaskConfig.model_validate({"file": str(path), "prompt": "{text}:", "words": WORDS, "id": "key"})
    with pytest.raises(
        DataError, match=r"rows.jsonl:10: key 0 was that of .*rows.jsonl:1 already; every row needs its own"
    ):
        own_rows(config, own_task(config), "causal", 0)
