"""SuperGLUE's tasks and the small ones beside them: prompts word by word, the official files, few-shot files."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import data_directory, write_jsonl
from plugbridge.errors import DataError
from plugbridge.tasks.encode import Encoder
from plugbridge.tasks.read import parts_of
from plugbridge.tasks.rows import UNLABELLED, Row, hold_out, load_rows, make_row, read_flat, split_rows
from plugbridge.tasks.spec import load_task

PAIRS = Path(__file__).parent.parent.parent / "pairs"
SUPERGLUE = {
    "boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC", "rte": "RTE", "wic": "WiC", "wsc": "WSC",
    "record": "ReCoRD",
}  # fmt: skip

PASSAGE = {"passage": "It rained.", "question": "was it wet", "label": True, "idx": 0}
SENSES = {"word": "place", "sentence1": "My place.", "sentence2": "No place.", "label": False, "idx": 0}
ANSWER = {"paragraph": "Reb came.", "question": "Who came?", "answer": "Reb", "label": 1, "idx": 0}
PRONOUN = {"marked": "Mark lied, so *he* ran.", "span1_text": "Mark", "span2_text": "he", "label": True, "idx": 0}
QUERY = {
    "passage": "Costa beat Zouma.", "query": "@placeholder won.", "entities": ["Costa", "Zouma"],
    "entity_list": "Costa, Zouma", "answers": ["Zouma", "Costa"], "idx": 0,
}  # fmt: skip
PAIR = {"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment", "idx": 0}
CHOICE = {"premise": "He fell.", "choice1": "It was icy.", "choice2": "It was dry.", "question": "cause", "label": 0}
PARAPHRASE = {"sentence1": "It rained.", "sentence2": "Rain fell.", "label": "1"}
NO_YES, FALSE_TRUE = (" no", " yes"), ("False", "True")


@pytest.mark.parametrize(
    ("name", "kind", "raw", "prompt", "options", "answer"),
    [
        ("boolq", "causal", PASSAGE, "It rained.\nQuestion: was it wet?\nAnswer:", NO_YES, 1),
        ("boolq", "seq2seq", PASSAGE, "boolq passage: It rained. question: was it wet", FALSE_TRUE, 1),
        ("wic", "causal", SENSES,
         "My place.\nNo place.\nQuestion: Does 'place' mean the same in both sentences?\nAnswer:", NO_YES, 0),
        ("wic", "seq2seq", SENSES, "wic sentence1: My place. sentence2: No place. word: place", FALSE_TRUE, 0),
        ("multirc", "causal", ANSWER,
         "Reb came.\nQuestion: Who came?\nAnswer: Reb\nIs the answer right?", NO_YES, 1),
        ("multirc", "seq2seq", ANSWER, "multirc question: Who came? answer: Reb paragraph: Reb came.", FALSE_TRUE, 1),
        ("wsc", "causal", PRONOUN,
         "Mark lied, so *he* ran.\nQuestion: Does *he* refer to Mark?\nAnswer:", NO_YES, 1),
        ("ax-b", "causal", PAIR,
         "It rained.\nQuestion: It was wet. True or False?\nAnswer:", (" True", " False"), 0),
        ("ax-b", "seq2seq", PAIR,
         "rte sentence1: It rained. sentence2: It was wet.", ("entailment", "not_entailment"), 0),
        ("ax-g", "seq2seq", PAIR,
         "rte sentence1: It rained. sentence2: It was wet.", ("entailment", "not_entailment"), 0),
        ("cola", "causal", {"sentence": "They runs.", "label": "0"},
         "They runs.\nIs this sentence good English? Answer:", NO_YES, 0),
        ("cola", "seq2seq", {"sentence": "They runs.", "label": "0"},
         "cola sentence: They runs.", ("unacceptable", "acceptable"), 0),
        ("mrpc", "causal", PARAPHRASE,
         "It rained.\nRain fell.\nQuestion: Do both sentences say the same?\nAnswer:", NO_YES, 1),
        ("mrpc", "seq2seq", PARAPHRASE,
         "mrpc sentence1: It rained. sentence2: Rain fell.", ("not_equivalent", "equivalent"), 1),
        ("snli", "causal", PAIR, "It rained.\nQuestion: It was wet. True, False, or Neither?\nAnswer:",
         (" True", " False", " Neither"), 0),
        ("snli", "seq2seq", PAIR,
         "snli hypothesis: It was wet. premise: It rained.", ("entailment", "contradiction", "neutral"), 0),
    ],
)  # fmt: skip
def test_prompts_word_by_word(
    name: str, kind: str, raw: dict[str, Any], prompt: str, options: tuple[str, ...], answer: int
) -> None:
    task = load_task(name)
    assert make_row(task, task.form(kind), "here", raw) == Row(prompt, options, answer, raw, "here")


def test_wsc_is_written_by_t5() -> None:
    task = load_task("wsc")
    row = make_row(task, task.form("seq2seq"), "here", PRONOUN)
    assert row == Row("wsc: Mark lied, so *he* ran.", FALSE_TRUE, 1, PRONOUN, "here", (), "Mark")
    row = make_row(task, task.form("seq2seq"), "here", PRONOUN, labelled=False)
    assert (row.answer, row.target, row.accepted) == (UNLABELLED, None, ())


def test_record_is_chosen_or_written() -> None:
    task = load_task("record")
    prompt = "Costa beat Zouma.\nQuery: @placeholder won.\nWho or what is @placeholder?\nAnswer:"
    assert make_row(task, task.causal, "here", QUERY) == Row(prompt, (" Costa", " Zouma"), 1, QUERY, "here", (0,))
    prompt = "record query: @placeholder won. entities: Costa, Zouma passage: Costa beat Zouma."
    row = make_row(task, task.form("seq2seq"), "here", QUERY)
    assert row == Row(prompt, ("Zouma", "Costa"), 0, QUERY, "here", (1,), "Zouma")
    bare = {key: value for key, value in QUERY.items() if key != "answers"}
    row = make_row(task, task.causal, "here", bare, labelled=False)
    assert (row.options, row.answer, row.accepted) == ((" Costa", " Zouma"), UNLABELLED, ())
    row = make_row(task, task.form("seq2seq"), "here", bare, labelled=False)
    assert (row.options, row.answer, row.target) == ((), UNLABELLED, None)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("boolq", {**PASSAGE, "label": "maybe"}, "label 'maybe' has no label word; known labels: false, true"),
        ("boolq", {**PASSAGE, "label": 1}, "label '1' has no label word"),
        ("multirc", {**ANSWER, "label": 2}, "label '2' has no label word; known labels: 0, 1"),
        ("multirc", {k: v for k, v in ANSWER.items() if k != "label"}, "field 'label' is missing"),
        ("wic", {k: v for k, v in SENSES.items() if k != "word"}, "field 'word' is missing"),
        ("record", {**QUERY, "answers": ["Kane"]}, "answer 'Kane' is none of the row's 2 options"),
        ("record", {**QUERY, "answers": []}, "field 'answers' is an empty list"),
        ("record", {**QUERY, "answers": [None]}, "field 'answers' holds None; expected texts"),
        ("record", {**QUERY, "answers": " "}, "field 'answers' is blank; expected a text"),
        ("record", {**QUERY, "entities": None}, "field 'entities' is null; expected a text"),
        ("record", {**QUERY, "entities": {"a": 1}}, "field 'entities' is an object; expected a text"),
        ("multirc", {**ANSWER, "question": ""}, "field 'question' is blank"),
        ("multirc", {**ANSWER, "answer": None}, "field 'answer' is null"),
        ("record", {**QUERY, "entities": ["Costa", 3]}, "field 'entities' holds 3; expected texts"),
        ("record", {**QUERY, "entities": [" "]}, "field 'entities' holds ' '; expected texts that are not empty"),
    ],
)
def test_bad_rows_are_named(name: str, raw: dict[str, Any], message: str) -> None:
    task = load_task(name)
    with pytest.raises(DataError, match=f"^here: {message}"):
        make_row(task, task.causal, "here", raw)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    ("name", "raw"), [("boolq", PASSAGE), ("copa", CHOICE), ("multirc", ANSWER), ("wsc", PRONOUN), ("record", QUERY)]
)
def test_only_unlabelled_rows_go_without_a_label(name: str, kind: str, raw: dict[str, Any]) -> None:
    task = load_task(name)
    null = {**raw, task.label: None}
    bare = {key: value for key, value in raw.items() if key != task.label}
    for changed, fault in ((null, "null; expected a label$"), (bare, "missing; the row has ")):
        with pytest.raises(DataError, match=f"^here: field '{task.label}' is {fault}"):
            make_row(task, task.form(kind), "here", changed)
        row = make_row(task, task.form(kind), "here", changed, labelled=False)
        assert (row.answer, row.target, row.accepted) == (UNLABELLED, None, ())


@pytest.mark.parametrize("file", ["train", "val"])
def test_a_null_label_is_refused_by_file_and_line(tmp_path: Path, file: str) -> None:
    rows = [{**PAIR, "idx": i} for i in range(9)]
    for name in ("train", "val"):
        bad = [{**row, "label": None} if i == 4 else row for i, row in enumerate(rows)]
        write_jsonl(tmp_path / f"{name}.jsonl", bad if name == file else rows)
    with pytest.raises(DataError, match=rf"/{file}\.jsonl:5: field 'label' is null; expected a label$"):
        load_rows(load_task("rte"), "causal", tmp_path, 0)


def test_t5_is_not_taught_a_blank_phrase() -> None:
    task = load_task("wsc")
    with pytest.raises(DataError, match=r"^here: field 'span1_text' is blank; expected a text$"):
        make_row(task, task.form("seq2seq"), "here", {**PRONOUN, "span1_text": " "})


def test_a_blank_answer_of_multirc_is_an_answer() -> None:
    task = load_task("multirc")
    prompts = [
        make_row(task, task.form(kind), "here", {**ANSWER, "answer": ""}).prompt for kind in ("causal", "seq2seq")
    ]
    assert prompts == [
        "Reb came.\nQuestion: Who came?\nAnswer: \nIs the answer right?",
        "multirc question: Who came? answer:  paragraph: Reb came.",
    ]


def test_questions_of_a_paragraph_are_held_out_together() -> None:
    rows = [Row(str(i), ("a", "b"), 0, {"paragraph_idx": i // 3}, f"f:{i}") for i in range(30)]
    kept, held = hold_out(rows, 0.2, 0, "paragraph_idx")
    assert (len(kept), len(held)) == (24, 6)
    assert sorted(kept + held, key=lambda row: int(row.prompt)) == rows
    assert {row.fields["paragraph_idx"] for row in kept}.isdisjoint(row.fields["paragraph_idx"] for row in held)
    assert (kept, held) == hold_out(rows, 0.2, 0, "paragraph_idx") != hold_out(rows, 0.2, 1, "paragraph_idx")


def test_t5_learns_wsc_from_the_rows_that_are_true(tmp_path: Path) -> None:
    target = {"span1_text": "Mark", "span1_index": 0, "span2_text": "he", "span2_index": 3}
    rows = [{"text": "Mark lied, so he ran.", "target": target, "label": i % 2 == 0, "idx": i} for i in range(20)]
    for name in ("train", "val"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    counts = {kind: load_rows(load_task("wsc"), kind, tmp_path, 0) for kind in ("causal", "seq2seq")}
    assert {kind: [len(found[s]) for s in ("validation", "test")] for kind, found in counts.items()} == {
        "causal": [3, 20], "seq2seq": [3, 20],
    }  # fmt: skip
    assert len(counts["causal"]["train"]) == 17
    assert [row.where for row in counts["seq2seq"]["train"]] == [
        row.where for row in counts["causal"]["train"] if row.answer == 1
    ]


def test_train_rows_of_which_none_is_left_are_told(tmp_path: Path) -> None:
    target = {"span1_text": "Mark", "span1_index": 0, "span2_text": "he", "span2_index": 3}
    rows = [{"text": "Mark lied, so he ran.", "target": target, "label": False, "idx": i} for i in range(9)]
    for name in ("train", "val"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert len(load_rows(load_task("wsc"), "causal", tmp_path, 0)["train"]) == 8
    with pytest.raises(DataError, match=r"no train row of .*train.jsonl is labelled true, and others teach nothing to"):
        load_rows(load_task("wsc"), "seq2seq", tmp_path, 0)
    answers = {"train": [("here", {**ANSWER, "paragraph_idx": 0, "idx": i}) for i in range(3)], "test": []}
    with pytest.raises(
        DataError, match=r"'multirc': t has 3 rows of 1 paragraph_idx, of which validation rows are held"
    ):
        split_rows(load_task("multirc"), "causal", lambda split: iter(answers[split]), {"train": "t", "test": "u"}, 0)


@pytest.mark.needs_data
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", SUPERGLUE)
def test_few_shot_files_load_and_round_trip(name: str, kind: str) -> None:
    """Every row of the 32-row files is read, put into words, into tokens, and back, letter by letter."""
    folder = data_directory() / "fewglue_32dev" / SUPERGLUE[name]
    task = load_task(name)
    form = task.form(kind)
    tokenizer = AutoTokenizer.from_pretrained(PAIRS / "gpt2" / "small")  # of bytes: loses nothing
    encoder = Encoder(tokenizer, kind, None)
    for file in ("train.jsonl", "dev32.jsonl"):
        flat = list(read_flat(task, folder / file))
        rows = [make_row(task, form, where, raw) for where, raw in flat]
        assert len({row.where for row in rows}) == 32
        assert len(rows) == (32 if name != "multirc" else sum(1 for _ in flat))
        for row in rows:
            found = encoder.encode(task, form, row)
            assert found.row is row
            assert tokenizer.decode(found.prompt, skip_special_tokens=True) == row.prompt
            texts = tuple(tokenizer.decode(option, skip_special_tokens=True) for option in found.options)
            assert texts == (row.options if form.generate is None else (row.target,))
            assert make_row(task, form, row.where, row.fields) == row


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("multirc", "causal", {"train": 27243, "test": 4848}),
        ("wic", "seq2seq", {"train": 5428, "test": 638}),
        ("wsc", "causal", {"train": 554, "test": 104}),
        ("wsc", "seq2seq", {"train": 554, "test": 104}),
        ("cola", "causal", {"train": 8551, "test": 527}),
        ("mrpc", "seq2seq", {"train": 4076, "test": 1725}),
        ("ax-b", "causal", {"train": 2490, "test": 1104}),
        ("ax-g", "seq2seq", {"train": 2490, "test": 356}),
        ("snli", "causal", {"train": 4600, "test": 9824}),  # limited
    ],
)
def test_official_files(name: str, kind: str, counts: dict[str, int]) -> None:
    task = load_task(name)
    rows = load_rows(task, kind, data_directory(), seed=0)
    assert {row.answer for row in rows["test"]} == set(range(len(rows["test"][0].options)))
    assert len(rows["test"]) == counts["test"]
    if name == "wsc" and kind == "seq2seq":
        assert len(rows["train"]) + len(rows["validation"]) < counts["train"]
    else:
        assert len(rows["train"]) + len(rows["validation"]) == counts["train"]
    if task.group is not None:
        assert {r.fields[task.group] for r in rows["train"]}.isdisjoint(
            r.fields[task.group] for r in rows["validation"]
        )


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "file", "counts"),
    [
        ("boolq", "superglue/BoolQ/val.jsonl", {True: 2033, False: 1237}),
        ("multirc", "superglue/MultiRC/val.jsonl", {0: 2773, 1: 2075}),
        ("wic", "superglue/WiC/train.jsonl", {True: 2714, False: 2714}),
        ("wsc", "superglue/WSC/val.jsonl", {False: 66, True: 38}),
        ("mrpc", "glue/MRPC/msr_paraphrase_test.txt", {"1": 1147, "0": 578}),
        ("cola", "glue/CoLA/in_domain_train.tsv", {"1": 6023, "0": 2528}),
        ("ax-g", "superglue/AX-g/AX-g.jsonl", {"not_entailment": 178, "entailment": 178}),
        ("snli", "snli_dev_test/labels.test", {"entailment": 3368, "contradiction": 3237, "neutral": 3219}),
    ],
)
def test_classes_of_the_official_files(name: str, file: str, counts: dict[Any, int]) -> None:
    task, path = load_task(name), data_directory() / file
    assert all(part.is_file() for part in parts_of(path, task.format))
    assert Counter(raw[task.label] for _, raw in read_flat(task, path)) == counts


@pytest.mark.needs_data
def test_every_official_pronoun_is_marked_once() -> None:
    for split in ("train", "val", "test"):
        for where, raw in read_flat(load_task("wsc"), data_directory() / "superglue" / "WSC" / f"{split}.jsonl"):
            assert raw["marked"].count(f"*{raw['span2_text']}*") == 1, where
            assert raw["marked"].replace("*", "").split() == raw["text"].replace("*", "").split()


@pytest.mark.needs_data
@pytest.mark.parametrize("name", [name for name in SUPERGLUE if name != "record"])
def test_official_test_files_have_no_labels(name: str) -> None:
    task = load_task(name)
    path = data_directory() / "superglue" / SUPERGLUE[name] / "test.jsonl"
    found = list(read_flat(task, path))
    for kind in ("causal", "seq2seq"):
        assert {make_row(task, task.form(kind), *row, labelled=False).answer for row in found} == {UNLABELLED}
    where, raw = found[0]
    with pytest.raises(DataError, match=r"test\.jsonl:1: field 'label' is missing"):
        make_row(task, task.causal, where, raw)
