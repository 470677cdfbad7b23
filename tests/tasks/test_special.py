"""Special tokens around texts, and the seam of prompt and answer: what is read is what the tokenizer gives."""

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import make_tokenizer
from plugbridge.cli.report import cut_line
from plugbridge.config import parse_config
from plugbridge.errors import DataError, ModelError
from plugbridge.models import Tokenizer as AnyTokenizer
from plugbridge.models import load_tokenizer
from plugbridge.prepare import prepare
from plugbridge.tasks.encode import Encoded, Encoder, TooLong, front_of
from plugbridge.tasks.remarks import cut_of, remarks
from plugbridge.tasks.rows import Row, make_row
from plugbridge.tasks.spec import Task, load_task, parse_task

PAIRS = Path(__file__).parent.parent.parent / "pairs"
TEXT = "the film was a sport and world of business Topic: Answer: yes or no plot is good bad Is it"
WORDS = TEXT.split(" ")
BOS, EOS = 1, 2


@cache
def llama_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before every text, bytes for what is unknown, and marks around a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return marked(tokenizer)


@cache
def gpt2_like() -> PreTrainedTokenizerFast:
    """As GPT-2's, of which some models' copies put a mark in front."""
    return marked(load_tokenizer(str(PAIRS / "gpt2" / "small")).backend_tokenizer, "<|endoftext|>", end=False)  # pyright: ignore


def marked(tokenizer: Tokenizer, mark: str = "<s>", end: bool = True) -> PreTrainedTokenizerFast:
    names = {name: tokenizer.token_to_id(name) for name in (mark, "</s>") if tokenizer.token_to_id(name) is not None}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A </s>" if end else f"{mark} $A", special_tokens=list(names.items())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=mark, eos_token="</s>" if end else mark)


def task_of(prompt: str, passage: str | None = None, answer: dict[str, Any] | None = None) -> Task:
    raw = {
        "name": "t", "title": "t", "source": "s", "licence": "l", "folder": "", "files": {}, "label": "label",
        "metrics": ["accuracy"], "passage": passage,
        "causal": {"prompt": prompt, **(answer or {"words": {"a": " sport", "b": " world"}})},
    }  # fmt: skip
    return parse_task(raw, "test")


def encode(tokenizer: Any, task: Task, positions: int | None = None, special: bool = True, **fields: Any) -> Encoded:
    encoder = Encoder(cast(AnyTokenizer, tokenizer), "causal", positions, special)
    return encoder.encode(task, task.causal, make_row(task, task.causal, "rows.jsonl:7", {"label": "a", **fields}))


@pytest.mark.parametrize("make", [llama_like, gpt2_like])
def test_a_prompt_begins_as_the_tokenizer_has_it(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """The mark of the beginning once, whatever is appended; no mark of the end before the answer, none in it."""
    tokenizer = make()
    row = encode(tokenizer, task_of("{text}\nTopic:"), text="the film was good")
    whole = tokenizer("the film was good\nTopic:").input_ids
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert list(row.prompt) == (whole[:-1] if make is llama_like else whole)
    assert row.prompt[0] == tokenizer.bos_token_id
    assert not set(marks) & {*row.prompt[1:], *row.options[0], *row.options[1]}
    for option, word in zip(row.options, (" sport", " world"), strict=True):
        text = tokenizer("the film was good\nTopic:" + word).input_ids
        assert [*row.prompt, *option] == (text[:-1] if make is llama_like else text)
    assert encode(tokenizer, task_of("{text}"), special=False, text="the film").prompt == tuple(
        tokenizer.encode("the film", add_special_tokens=False)
    )


def test_a_mark_that_the_prompt_writes_out_is_not_doubled() -> None:
    row = encode(llama_like(), task_of("<s>{text}\nTopic:"), text="the film")
    assert row.prompt.count(BOS) == 1
    assert row.prompt[0] == BOS
    t5 = Encoder(load_tokenizer(str(PAIRS / "t5" / "small")), "seq2seq", None)
    task = task_of("{text}")
    rows = [
        t5.encode(task, task.causal, make_row(task, task.causal, "", {"text": x, "label": "a"}))
        for x in ("a b", "a b</s>")
    ]
    assert rows[0].prompt == rows[1].prompt == tuple(t5.tokenizer.encode("a b"))
    assert [option[-1] for option in rows[0].options] == [1, 1]


def test_what_texts_are_written_is_behind_the_mark_too() -> None:
    row = encode(
        llama_like(), task_of("{text}\nTopic:", answer={"generate": " {label}"}), text="the film", label="good"
    )
    assert (row.prompt[0], row.options[0][-1]) == (BOS, EOS)
    assert BOS not in row.options[0]


def test_a_prompt_of_marks_alone_is_refused() -> None:
    task = task_of("{text}")
    for tokenizer, prompt in ((llama_like(), ""), (llama_like(), "<s>"), (make_tokenizer(), "")):
        encoder = Encoder(cast(AnyTokenizer, tokenizer), "causal", None)
        with pytest.raises(DataError, match=r"^r:1: the prompt has no tokens of its own; a model needs at least one$"):
            encoder.encode(task, task.causal, Row(prompt, (" yes", " no"), 0, {}, "r:1"))


def test_tokenizers_without_marks_add_none() -> None:
    for source in ("gpt2", "t5"):
        assert front_of(load_tokenizer(str(PAIRS / source / "small"))) == ()
    assert front_of(cast(AnyTokenizer, make_tokenizer())) == ()


def test_a_tokenizer_that_reads_otherwise_with_marks_is_refused() -> None:
    class Odd:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [1, 7] if add_special_tokens else [8]

    with pytest.raises(ModelError, match=r"reads 'a' as \[8\] without special tokens and as \[1, 7\] with them"):
        front_of(cast(AnyTokenizer, Odd()))


@pytest.mark.parametrize("positions", [12, 13, 14])
def test_the_mark_takes_a_position(positions: int) -> None:
    tokenizer, task = llama_like(), task_of("{text} Topic:", passage="text")
    text = "the film was a sport and the world was a business " * 3
    row, bare = (encode(tokenizer, task, positions, special, text=text) for special in (True, False))
    assert len(row.prompt) + 1 == len(bare.prompt) + 1 == positions
    assert row.kept < bare.kept < 1
    with pytest.raises(TooLong, match=r"the prompt takes 5 tokens but the model has room for 3"):
        encode(tokenizer, task_of("the film Topic: {x}"), 4, x="a")


@pytest.mark.parametrize("make", [llama_like, gpt2_like, lambda: load_tokenizer(str(PAIRS / "gpt2" / "large"))])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(make: Callable[[], Any]) -> None:
    tokenizer, generator = make(), random.Random(0)
    seamless = 0
    for _ in range(60):
        prompt = "".join(generator.choice([" ", " ", "\n", ". ", ""]) + generator.choice(WORDS) for _ in range(30))
        word = generator.choice([" ", "\n", "", ": "]) + generator.choice(WORDS)
        row = encode(tokenizer, task_of("{text}", answer={"words": {"a": word, "b": " x y z"}}), text=prompt)
        whole = tokenizer.encode(prompt + word, add_special_tokens=False)
        found = [*row.prompt[len(front_of(tokenizer)) :], *row.options[0]]
        assert found == whole or row.fused
        seamless += not row.fused
    assert seamless > 30


def test_an_answer_behind_a_line_break_is_read_as_it_stands_there() -> None:
    """By itself such a tokenizer puts a blank before it."""
    tokenizer = llama_like()
    row = encode(
        tokenizer, task_of("{text}\nTopic:\n", answer={"words": {"a": "sport", "b": "world"}}), text="the film"
    )
    assert tokenizer.convert_ids_to_tokens(list(row.options[1]))[0].startswith("w")
    assert tokenizer.tokenize("world")[0].startswith("▁")


def test_an_answer_that_melts_into_the_prompt_is_said() -> None:
    tokenizer = load_tokenizer(str(PAIRS / "gpt2" / "small"))
    encoder = Encoder(tokenizer, "causal", None)
    for prompt, words, said in (
        ("{text}\nTopic: ", ["animal", "plant"], 1),
        ("{text}\nTopic:", [" animal", " plant"], 0),
    ):
        task = task_of(prompt, answer={"words": dict(zip("ab", words, strict=True)), "score": "mean"})
        rows = [make_row(task, task.causal, str(i), {"text": f"It is {i}.", "label": "a"}) for i in range(3)]
        lines = remarks(task, encoder, {"train": encoder.encode_all(task, task.causal, rows)})
        assert [line for line in lines if "one token of the prompt's end" in line] == [
            "in 3 of 3 rows the tokenizer would make one token of the prompt's end and an answer's beginning, such as "
            "'s 0.\\nTopic: ' and 'animal'; they are read one after the other: end the prompt without a blank, and "
            "begin answers with one"
        ][:said]  # fmt: skip


@pytest.mark.parametrize("name", ["rte", "copa", "sst2", "wordnet-kind", "boolq", "trec"])
def test_the_demos_words_are_what_they_were(name: str) -> None:
    tokenizer = load_tokenizer(str(PAIRS / "gpt2" / "small"))
    encoder, form = Encoder(tokenizer, "causal", None), load_task(name).causal
    prompts = [form.prompt] if form.prompt is not None else list((form.prompts or {}).values())
    for prompt in prompts:
        for word in (form.words or {"0": " It was icy."}).values():
            task = task_of(
                str(prompt).replace("{", "").replace("}", "") + "{x}:", answer={"words": {"a": word, "b": " p q"}}
            )
            row = encode(tokenizer, task, x="y")
            assert (row.options[0], row.fused) == (encoder.text(word), False)


CHINESE = "这部电影的故事情节非常精彩、演员的表演也令人难忘、值得一看再看。"


@pytest.mark.parametrize("positions", [40, 64, 90])
def test_a_passage_without_blanks_is_cut_by_tokens(positions: int) -> None:
    tokenizer = load_tokenizer(str(PAIRS / "gpt2" / "small"))
    encoder, task = Encoder(tokenizer, "causal", positions), task_of("{text}\nTopic:", passage="text")
    texts = [CHINESE[i:] + CHINESE[:i] for i in range(6)]
    rows = [make_row(task, task.causal, str(i), {"text": text * 3, "label": "a"}) for i, text in enumerate(texts)]
    found = encoder.encode_all(task, task.causal, rows)
    longest = max(map(len, found[0].options))
    for text, row in zip(texts, found, strict=True):
        prompt = cast(str, tokenizer.decode(list(row.prompt)))
        passage = prompt.removesuffix("\nTopic:")
        assert (text * 3).startswith(passage)
        assert row.kept == pytest.approx(len(passage) / len(text * 3))
        assert positions - 6 < len(row.prompt) + longest <= positions  # a letter has up to three tokens, two a comma
    assert len({row.prompt for row in found}) == 6
    assert cut_of(found) == {"rows": 6, "cut": 6, "emptied": 0}
    assert f"6 of 6 train rows lose the end of 'text' to fit {positions} tokens" in remarks(
        task, encoder, {"train": found}
    )


def test_a_report_says_what_was_cut() -> None:
    none = {"train": {"rows": 9, "cut": 0, "emptied": 0}}
    some = {"train": {"rows": 1200, "cut": 1100, "emptied": 3}, "test": {"rows": 9, "cut": 2, "emptied": 0}}
    assert cut_line({"small": none, "large": none}) is None
    assert cut_line({"small": some, "large": none}) == (
        "passages were cut to fit: 1,100 of 1,200 train rows for small (3 to nothing), 2 of 9 test rows for small"
    )
    assert cut_line({}) is None  # of a run from before


def test_a_cut_keeps_the_text_as_it_is() -> None:
    tokenizer, task = load_tokenizer(str(PAIRS / "gpt2" / "small")), task_of("Read.\n{text}\n\nTopic:", passage="text")
    text = "One  line.\n\n\tTwo: “lines”,\r\n   three.\n" * 9
    row = encode(tokenizer, task, 60, text=text)
    prompt = cast(str, tokenizer.decode(list(row.prompt)))
    kept = prompt.removeprefix("Read.\n").removesuffix("\n\nTopic:")
    assert 0 < len(kept) < len(text)
    assert text.startswith(kept)
    assert "\n\n\tTwo: “lines”,\r\n" in kept


def test_a_tokenizer_that_does_not_tell_where_its_tokens_end_cuts_by_letters() -> None:
    class Slow:
        pad_token_id = eos_token_id = unk_token_id = None

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            del add_special_tokens
            return [len(word) for word in text.split()]

    task = task_of("{text} Topic:", passage="text", answer={"words": {"a": " x", "b": " yy"}})
    row = encode(Slow(), task, 6, text="one  three\nseven and nine and more")
    assert row.prompt == (3, 5, 5, 3, 6)
    assert row.kept == len("one  three\nseven and ") / len("one  three\nseven and nine and more")


def test_rows_of_which_nothing_is_left_are_counted_or_refused() -> None:
    tokenizer = make_tokenizer()
    encoder, task = Encoder(cast(AnyTokenizer, tokenizer), "causal", 6), task_of("{text} is it : {x}", passage="text")

    def encoded(*fields: tuple[str, str]) -> list[Encoded]:
        raws = [{"text": text, "x": x, "label": "a"} for text, x in fields]
        words = task.model_copy(update={"causal": task.causal.model_copy(update={"words": {"a": " yes", "b": " no"}})})
        rows = [make_row(words, words.causal, str(i), raw) for i, raw in enumerate(raws)]
        return encoder.encode_all(words, words.causal, rows)

    rows = encoded(("w1 w2", "w3"), ("w1", "w4"), ("w1 w2", "w3 w4"))
    assert [row.kept for row in rows] == [2 / 5, 1, 0]
    assert cut_of(rows) == {"rows": 3, "cut": 2, "emptied": 1}
    said = remarks(task, encoder, {"train": rows})
    assert said[0] == "2 of 3 train rows lose the end of 'text' to fit 6 tokens, 1 of them all of it"
    with pytest.raises(
        DataError, match=r"nothing of 'text' fits in any of the 2 test rows \(6 tokens\); raise max_length"
    ):
        remarks(task, encoder, {"train": rows, "test": encoded(("w1 w2", "w3 w4"), ("w1", "w5 w4"))})
    with pytest.raises(
        DataError, match="all 2 train prompts are the same 5 tokens, the first at 0; does the tokenizer"
    ):
        remarks(task, encoder, {"train": encoded(("what", "w3"), ("why", "w3"))})


def test_options_that_the_first_token_cannot_tell_apart_are_said_or_refused() -> None:
    task = task_of("{x}", answer={"options_from": "choices", "option": " {option}", "score": "first"})
    encoder = Encoder(cast(AnyTokenizer, make_tokenizer()), "causal", None)

    def encoded(*choices: list[str]) -> list[Encoded]:
        raws = [{"x": "w1", "choices": some, "label": some[0]} for some in choices]
        return encoder.encode_all(task, task.causal, [make_row(task, task.causal, "", raw) for raw in raws])

    rows = encoded(["w1 w2", "w1 w3"], ["w1", "w3"])
    assert remarks(task, encoder, {"validation": rows[1:], "train": rows[1:]}) == []
    said = remarks(task, encoder, {"train": rows[1:], "test": rows})
    assert said[0].startswith(
        "in 1 of 3 rows options begin with the same token, which `score: first` cannot tell apart"
    )
    with pytest.raises(DataError, match="all 1 rows have options that begin with the same token"):
        remarks(task, encoder, {"train": rows[:1]})


def test_texts_that_are_too_long_to_be_written_are_said() -> None:
    task = task_of("{x}", answer={"generate": " {label}", "max_new_tokens": 2})
    encoder = Encoder(cast(AnyTokenizer, make_tokenizer()), "causal", None)
    raws = [{"x": f"w{i}", "label": " ".join(["w9"] * i)} for i in range(1, 6)]
    rows = encoder.encode_all(task, task.causal, [make_row(task, task.causal, "", raw) for raw in raws])
    assert remarks(task, encoder, {"train": rows}) == [
        "3 of 5 train rows' texts take more than the 2 tokens that are written at most, the longest 5; raise "
        "max_new_tokens"
    ]


def test_a_run_reads_prompts_as_its_tokenizer_begins_them(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = run_config()
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    plain = prepare(parse_config(raw, "test"), None)
    for name in ("small", "large"):
        shutil.copytree(raw[name], tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    marks = {"small": str(tmp_path / "small"), "large": str(tmp_path / "large")}
    with_mark, without = (
        prepare(parse_config({**raw, **marks, "special_tokens": key}, "test"), None) for key in (True, False)
    )
    for ours, theirs in zip(with_mark.large_rows["test"], plain.large_rows["test"], strict=True):
        assert (ours.prompt, ours.options) == ((1, *theirs.prompt), theirs.options)
    assert without.rows == plain.rows
    assert without.inputs["task"] == plain.inputs["task"]
    assert with_mark.inputs["task"] == {**plain.inputs["task"], "front": [1]}
    message = r"small's tokenizer reads 'w\d+ is it : w\d+' as \[1, \d+, 5, 6, .*, large's as \[\d+, 5, 6, 7, "
    with pytest.raises(ModelError, match=message):
        prepare(parse_config({**raw, "small": marks["small"]}, "test"), None)
