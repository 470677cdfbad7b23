"""Two tokenizers of one vocabulary: what counts is what becomes of the run's own rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import make_tokenizer, save_model, write_jsonl
from plugbridge.config import TaskConfig, parse_config
from plugbridge.errors import ModelError
from plugbridge.models import check_same_tokenizer
from plugbridge.prepare import prepare
from plugbridge.tasks.alike import encode_alike, same_tokenizer
from plugbridge.tasks.encode import Encoder
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.own import own_task
from plugbridge.tasks.rows import Row

TASK = own_task(TaskConfig(file="f", prompt="{text} :", words={"0": "yes", "1": "no"}, passage="text"))
CHOOSES = TASK.form("causal")
WRITES = own_task(TaskConfig(file="f", prompt="{text} :", generate="{label}", max_new_tokens=4)).form("causal")


def row(text: str, target: str | None = None) -> Row:
    return Row(f"{text} :", ("yes", "no"), 0, {"text": text}, "rows.jsonl:3", target=target)


def pieces(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of one vocabulary, whatever the order of its merges."""
    words = ["<pad>", "</s>", "<unk>", *"yesno:ab ", "ab", "ba", "es", "yes", "no"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


MERGES = [("a", "b"), ("b", "a"), ("e", "s"), ("y", "es"), ("n", "o")]


def changed(change: Callable[[Any], Any]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    change(cast(Any, tokenizer).backend_tokenizer)
    return tokenizer


def lowercase(inner: Any) -> None:
    inner.normalizer = normalizers.Lowercase()


def split_at_blanks(inner: Any) -> None:
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def whole_word(inner: Any) -> None:
    inner.add_tokens([AddedToken("w1", single_word=False)])


def without_blanks(inner: Any) -> None:
    inner.normalizer = normalizers.Replace(Regex(r"\s+:"), ":")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def encode(small: Any, large: Any, rows: list[Row], form: PromptForm = CHOOSES, room: Any = (None, None)):
    encoders = [Encoder(each, "causal", positions) for each, positions in zip((small, large), room, strict=True)]
    check_same_tokenizer(small, large)  # their vocabularies are the same
    read = encoders[0].encode_all(TASK, form, rows)
    return read, encode_alike(TASK, form, rows, read, *encoders)


DIFFER = {
    "a normaliser": (make_tokenizer(), changed(lowercase), "IT w1", "as [2, 9, 7], large's as [6, 9, 7]"),
    "a pre-tokenizer": (make_tokenizer(), changed(split_at_blanks), "it: w1", "[6, 7, 9, 7], large's as [2, 9, 7]"),
    "an added token": (make_tokenizer(), changed(whole_word), "w12", "as [20, 7], large's as [9, 2, 7]"),
    "a blank": (make_tokenizer(), changed(without_blanks), "it", "as [6, 7], large's as [2]"),
    "merges": (pieces(MERGES), pieces(MERGES[::-1]), "aba", ""),
}


@pytest.mark.parametrize("what", DIFFER)
def test_a_text_that_is_read_otherwise_is_refused(what: str) -> None:
    small, large, text, said = DIFFER[what]
    alike = {"merges": "b", "a blank": ""}.get(what, "is w3")
    with pytest.raises(ModelError) as caught:
        encode(small, large, [row(alike), row(text)])
    assert str(caught.value).startswith(f"rows.jsonl:3: small's tokenizer reads '{text} :' as [")
    assert said in str(caught.value)
    assert str(caught.value).endswith("; a module can only move between models that read the same tokens")


def test_rows_that_both_read_alike_pass_whatever_else_differs() -> None:
    read, found = encode(make_tokenizer(), changed(lowercase), [row("it is w1"), row("w3")])
    assert found == read
    assert found is not read


def test_an_option_that_is_read_otherwise_is_refused() -> None:
    one = Row("it :", ("yes", "No"), 0, {"text": "it"}, "rows.jsonl:9")
    with pytest.raises(ModelError, match=r"rows.jsonl:9: small's tokenizer reads 'No' as \[2\], large's as \[4\]"):
        encode(make_tokenizer(), changed(lowercase), [one])


def test_a_target_that_is_read_or_written_otherwise_is_refused() -> None:
    with pytest.raises(ModelError, match=r"small's tokenizer reads 'Yes w1' as \[2, 9, 1\], large's as \[3, 9, 1\]"):
        encode(make_tokenizer(), changed(lowercase), [row("it", "Yes w1")], WRITES)
    dashes = changed(lambda inner: setattr(inner, "decoder", decoders.Metaspace("w")))
    with pytest.raises(ModelError, match=r"of the tokens \[3, 9, 1\] small's tokenizer writes 'yes w1', large's 'yes"):
        encode(make_tokenizer(), dashes, [row("it", "yes w1")], WRITES)


def test_a_long_text_is_shown_about_where_it_differs() -> None:
    with pytest.raises(ModelError) as caught:
        encode(make_tokenizer(), changed(lowercase), [row("w1 " * 40 + "IT" + " w2" * 40)])
    assert f"reads '{('w1 ' * 40)[:60]}…' as […, 9, 9, 2, 10, 10, 10, 10, 10, …], large's as" in str(caught.value)


def test_a_row_may_be_cut_at_another_place() -> None:
    rows = [row("w1 w2 w3 w4 w5 w6")]
    read, found = encode(make_tokenizer(), changed(lowercase), rows, room=(5, 6))
    assert len(read[0].prompt) == 4
    assert len(found[0].prompt) == 5
    with pytest.raises(ModelError, match="reads 'W1 w2 w3 w4 w5 w6 :' as"):
        encode(make_tokenizer(), changed(lowercase), [row("W1 w2 w3 w4 w5 w6")], room=(5, 6))


def test_the_same_tokenizer_reads_no_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("it is w1")]
    assert same_tokenizer(make_tokenizer(), make_tokenizer())
    monkeypatch.setattr("plugbridge.tasks.alike._check_alike", lambda *_: pytest.fail("read twice"))
    read, found = encode(make_tokenizer(), make_tokenizer(), rows)
    assert found == read


def test_a_run_is_refused_before_anything_is_written(run_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    large = save_model("gpt2", tmp_path / "large", hidden=16, layers=3, heads=4, seed=2)
    changed(lowercase).save_pretrained(large)
    words = [*(f"w{i}" for i in range(19)), "IT"]
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [{"word": word, "label": "even"} for word in words]))
    task = {"file": rows, "prompt": "is it : {word}", "words": {"even": "yes", "odd": "no"}}
    with pytest.raises(ModelError, match=r"reads .is it : IT. as \[…, 6, 7, 2\], large.s as \[…, 6, 7, 6\];"):
        prepare(parse_config(run_config(large=str(large), task=task), "test"), None)
