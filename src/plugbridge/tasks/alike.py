"""Whether two tokenizers of one vocabulary read a run's rows as the same tokens.

Merges, normalisers, pre-tokenizers, added tokens and templates are no part of the vocabulary, and any of them may
differ. What counts is what becomes of the run's own texts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from plugbridge.errors import ModelError
from plugbridge.models import Tokenizer, tokenizer_errors
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row
from plugbridge.tasks.spec import Task

SHOWN = 8
"""Tokens of a text that a message shows, from shortly before the first that differs."""


def encode_alike(
    task: Task, form: PromptForm, rows: Sequence[Row], read: Sequence[Encoded], small: Encoder, large: Encoder
) -> list[Encoded]:
    """Rows as the large model reads them, where the small one has `read` them already.

    They may be cut at other places. Raises ModelError at the first row of which the tokenizers make other tokens, and
    DataError as `Encoder.encode_all`.
    """
    if same_encoder(small, large):
        return list(read)
    found = large.encode_all(task, form, rows)
    as_small = replace(large, positions=small.positions)
    for row, one, other in zip(rows, read, found, strict=True):
        _check_alike(row, form, one, other if one == other else as_small.encode(task, form, row))
        if form.generate is not None:
            _check_written(row, one, small.tokenizer, large.tokenizer)
    return found


def same_encoder(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders make the same tokens of any row, as far as that can be told without one."""
    settings = [(each.kind, each.positions, each.special) for each in (one, other)]
    return settings[0] == settings[1] and same_tokenizer(one.tokenizer, other.tokenizer)


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers are the same in all that they are made of, as far as that can be told without a text."""
    engines: list[Any] = [getattr(each, "backend_tokenizer", None) for each in (one, other)]
    cleans = {getattr(each, "clean_up_tokenization_spaces", None) for each in (one, other)}  # in decoding
    if None in engines or type(one) is not type(other) or len(cleans) > 1:
        return False
    return engines[0].to_str() == engines[1].to_str()


def _check_alike(row: Row, form: PromptForm, one: Encoded, other: Encoded) -> None:
    texts = (row.prompt, *(row.options if form.generate is None else (row.target or "",)))
    pairs = zip((one.prompt, *one.options), (other.prompt, *other.options), strict=True)
    for i, (a, b) in enumerate(pairs):
        if a != b:
            first = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            start = max(0, first - SHOWN // 4)
            raise ModelError(
                f"{row.where}: small's tokenizer reads {_short(texts[i])} as {_some(a, start)}, large's as "
                f"{_some(b, start)}; a module can only move between models that read the same tokens"
            )


def _check_written(row: Row, encoded: Encoded, small: Tokenizer, large: Tokenizer) -> None:
    for option in encoded.options:
        with tokenizer_errors("write", option):
            one, other = (each.decode(list(option), skip_special_tokens=True) for each in (small, large))
        if one != other:
            raise ModelError(
                f"{row.where}: of the tokens {_some(option, 0)} small's tokenizer writes {_short(str(one))}, large's "
                f"{_short(str(other))}; a module can only move between models that write the same texts"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _some(tokens: Sequence[int], start: int) -> str:
    """A few tokens of many."""
    shown = [str(token) for token in tokens[start : start + SHOWN]]
    return f"[{', '.join([*['…'][: start > 0], *shown, *['…'][: len(tokens) > start + SHOWN]])}]"
