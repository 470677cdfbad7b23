"""Rows in tokens: what is cut, what is padded, what is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from conftest import VOCAB, make_tokenizer
from plugbridge.config import parse_config
from plugbridge.errors import DataError, ModelError
from plugbridge.models import tokenizer_errors
from plugbridge.prepare import prepare
from plugbridge.tasks.encode import IGNORE, Encoded, Encoder, TooLong, collate, gold
from plugbridge.tasks.remarks import unequal_words
from plugbridge.tasks.rows import Row, make_row
from plugbridge.tasks.spec import Task, parse_task

PAD, EOS, UNK = 0, 1, 2


def task_of(prompt: str, passage: str | None = None, words: dict[str, str] | None = None) -> Task:
    raw = {
        "name": "t", "title": "t", "source": "s", "licence": "l", "folder": "", "files": {}, "label": "label",
        "metrics": ["accuracy"], "passage": passage,
        "causal": {"prompt": prompt, "words": words or {"even": "yes", "odd": "no"}},
    }  # fmt: skip
    return parse_task(raw, "test")


def encode(encoder: Encoder, task: Task, **fields: Any) -> Encoded:
    form = task.form(encoder.kind)
    row: Row = make_row(task, form, "rows.jsonl:7", {"label": "odd", **fields})
    return encoder.encode(task, form, row)


def ids(text: str) -> tuple[int, ...]:
    return tuple(VOCAB.index(word) if word in VOCAB else UNK for word in text.split())


def encoder(kind: str = "causal", positions: int | None = None) -> Encoder:
    return Encoder(make_tokenizer(), kind, positions)


def test_a_row_in_tokens() -> None:
    task = task_of("is it : {word}", words={"even": "yes", "odd": "no no"})
    assert encode(encoder(), task, word="w3") == Encoded(ids("is it : w3"), (ids("yes"), ids("no no")), 1)
    assert encode(encoder("seq2seq"), task, word="w3") == Encoded(
        (*ids("is it : w3"), EOS), ((*ids("yes"), EOS), (*ids("no no"), EOS)), 1
    )


def test_single_tokens_of_t5_have_no_end_mark_in_scoring_or_training() -> None:
    task = task_of("is it : {word}", words={"even": "yes", "odd": "no"})
    row = encode(encoder("seq2seq"), task, word="w3")
    assert row.options == (ids("yes"), ids("no"))
    assert (row.target, row.weight, row.bare) == (ids("no"), 1, True)
    assert gold(encoder("seq2seq"), [row]).labels.tolist() == [[*ids("no")]]
    longer = encode(encoder("seq2seq"), task_of("is it : {word}", words={"even": "yes", "odd": "no no"}), word="w3")
    assert (longer.target, longer.weight, longer.bare) == ((*ids("no no"), EOS), 3, False)


def test_batches_by_hand() -> None:
    long, short = ((5, 6, 7), (3,)), ((5,), (3, 4))
    batch = collate(encoder(), [long, short])
    assert batch.input_ids.tolist() == [[5, 6, 7, 3], [5, 3, 4, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORE] * 3 + [3], [IGNORE, 3, 4, IGNORE]]
    batch = collate(encoder("seq2seq"), [long, short])
    assert batch.input_ids.tolist() == [[5, 6, 7], [5, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[3, IGNORE], [3, 4]]
    assert set(batch.inputs("seq2seq")) - set(batch.inputs("causal")) == {"labels"}
    right = gold(encoder(), [Encoded((5, 6), ((3,), (4,)), 1)])
    assert right.labels.tolist() == [[IGNORE, IGNORE, 4]]


@pytest.mark.parametrize(("kind", "cost"), [("causal", 2), ("seq2seq", 1)])  # the longest option, or the end mark
@pytest.mark.parametrize("positions", [7, 8, 12, 20])
def test_a_long_passage_is_cut_and_nothing_else(kind: str, cost: int, positions: int) -> None:
    task = task_of("{text} : is {word} it :", passage="text", words={"even": "yes", "odd": "no no"})
    text = " ".join(f"w{i}" for i in range(14))
    row = encode(encoder(kind, positions), task, text=text, word="w3")
    kept = min(14, positions - cost - len(ids(": is w3 it :")))
    end = (EOS,) if kind == "seq2seq" else ()
    assert row.prompt == (*ids(" ".join(text.split()[:kept])), *ids(": is w3 it :"), *end)
    assert row.options == ((*ids("yes"), *end), (*ids("no no"), *end))
    assert row.answer == 1


def test_a_row_that_fits_exactly_is_not_cut() -> None:
    task = task_of("is it : {word}")
    row = encode(encoder(positions=5), task, word="w1")
    assert row.prompt == ids("is it : w1")
    message = (
        "rows.jsonl:7: the prompt takes 4 tokens but the model has room for 3 (its positions, or max_length, less the "
        "longest option); shorten the prompt, or name the field that may be cut as the task's `passage`"
    )
    with pytest.raises(TooLong, match=f"^{re.escape(message)}$"):
        encode(encoder(positions=4), task, word="w1")


def test_what_no_cut_can_save_is_refused() -> None:
    task = task_of("{text} is it : {word}", passage="text")
    message = (
        r"takes 6 tokens but the model has room for 3 \(.*\); without its passage, 'text', it still takes 4; "
        "raise max_length, take a model with more positions, or leave the row out$"
    )
    with pytest.raises(TooLong, match=message):
        encode(encoder(positions=4), task, text="w1 w2", word="w1")
    with pytest.raises(DataError, match="field 'text' is missing"):
        encode(encoder(positions=4), task_of("is it : {word}", passage="text"), word="w1")


def test_rows_too_long_are_counted() -> None:
    task = task_of("{text} is it : {word}", passage="text")

    def encode_all(*words: str) -> list[Encoded]:
        fields = [{"text": "w1 w2", "word": word, "label": "odd"} for word in words]
        rows = [make_row(task, task.causal, f"rows.jsonl:{i}", raw) for i, raw in enumerate(fields)]
        return encoder(positions=5).encode_all(task, task.causal, rows)

    assert [row.prompt for row in encode_all("w3", "w4")] == [ids("is it : w3"), ids("is it : w4")]
    with pytest.raises(TooLong, match=r"^rows.jsonl:1: .* still takes 6; .* leave the row out$"):
        encode_all("w3", "w4 w5 w6")
    with pytest.raises(TooLong, match=r"^rows.jsonl:1: .* leave the row out \(2 more of 4 rows are too long\)$"):
        encode_all("w3", "w4 w5 w6", "w4 w5", "w4 w5 w6")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"even": "perhaps", "odd": "maybe"}, r"'perhaps' and 'maybe' are the same tokens \(unknown to the"),
        ({"even": "yes", "odd": " yes"}, r"'yes' and ' yes' are the same tokens; choose words"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_words_that_the_tokenizer_does_not_tell_apart(kind: str, words: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(encoder(kind), task_of("is it : {word}", words=words), word="w1")


def test_one_unknown_word_is_still_a_word() -> None:
    row = encode(encoder(), task_of("is it : {word}", words={"even": "yes", "odd": "perhaps"}), word="w1")
    assert row.options == (ids("yes"), (UNK,))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_option_without_tokens_is_refused(kind: str) -> None:
    task, row = task_of("{word}"), Row("w1", ("yes", ""), 0, {}, "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows.jsonl:7: option '' has no tokens"):
        encoder(kind).encode(task, task.form(kind), row)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert Encoder(tokenizer, "causal", None).pad == EOS
    assert encoder().pad == PAD


def test_a_prefix_takes_positions_of_its_own(run_config: Callable[..., dict[str, Any]]) -> None:
    found = {
        (family, method): prepare(parse_config(run_config(family, method), "test"), None).encoder.positions
        for family, method in (("gpt2", "lora"), ("gpt2", "prefix"), ("t5", "prefix"))
    }
    assert found == {("gpt2", "lora"): 32, ("gpt2", "prefix"): 30, ("t5", "prefix"): None}


@pytest.mark.parametrize("positions", [2, 3])
def test_an_answer_that_leaves_no_room_is_not_the_prompts_fault(positions: int) -> None:
    """Whatever is cut, the prompt cannot fit."""
    task = task_of("is it : {word}", passage="word", words={"even": "yes yes yes", "odd": "no"})
    with pytest.raises(TooLong) as caught:
        encode(encoder(positions=positions), task, word="w3")
    assert str(caught.value) == (
        f"rows.jsonl:7: the prompt takes 4 tokens but the answer alone may take 3 of {positions} (the model's "
        "positions, or max_length); lower max_new_tokens or shorten the options, raise max_length, or take a model "
        "with more positions"
    )


def test_what_a_tokenizer_cannot_do_is_one_line() -> None:
    """Of what such a vocabulary does not have, tokenizers' own exception is of no class but the plainest."""
    inner = TokenizersTokenizer(WordLevel({"<pad>": 0, "it": 1, "is": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    broken: Any = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    reader = Encoder(broken, "causal", None)
    assert reader.text("it is") == (1, 2)
    cannot = r"^the tokenizer cannot read 'it was': WordLevel error: Missing \[UNK\] token from the vocabulary$"
    with pytest.raises(ModelError, match=cannot):
        reader.text("it was")
    with pytest.raises(ModelError, match=cannot):
        reader._ends("it was", 3)
    with pytest.raises(ModelError, match=r"^the tokenizer cannot read '"):
        assert reader.front
    with pytest.raises(ModelError, match=r"^the tokenizer cannot write \[-1\]: "), tokenizer_errors("write", [-1]):
        broken.decode([-1])


def test_words_of_unequal_length_are_said() -> None:
    task = task_of("is it : {word}", words={"even": "yes", "odd": "no no"})
    row = encode(encoder(), task, word="w3")
    assert unequal_words(task.causal, [row]) == (
        "the label words differ in tokens ('yes' 1, 'no no' 2); they are ranked by the sum of their tokens' "
        "log-probabilities (task.score: sum)"
    )
    plain = task_of("is it : {word}")
    assert unequal_words(plain.causal, [encode(encoder(), plain, word="w3")]) is None


def test_words_that_begin_alike_cannot_be_told_apart_by_the_first_token() -> None:
    task = task_of("is it : {word}", words={"even": "no yes", "odd": "no no"})
    first = task.model_copy(update={"causal": task.causal.model_copy(update={"score": "first"})})
    assert encode(encoder(), task, word="w3").score == "sum"
    with pytest.raises(DataError, match="'no yes' and 'no no' begin with the same token, and `score` is first; choose"):
        encode(encoder(), first, word="w3")
