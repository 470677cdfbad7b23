"""Rows to token ids, and batches of them to padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plugbridge.errors import DataError
from plugbridge.models import Tokenizer
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row, passage_of, refill
from plugbridge.tasks.spec import Task

IGNORE = -100


class TooLong(DataError):
    """A row that does not fit the model, however much of its passage is cut."""


@dataclass(frozen=True)
class Encoded:
    """One row in tokens, and the row itself. For seq2seq models every option ends with the end-of-sequence token.

    Where the model writes its answer, the one option is the text that training writes, with an end mark for causal
    models too. Equal tokens are equal rows, whatever row they came from.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int
    row: Row | None = field(default=None, compare=False, repr=False)

    @property
    def targets(self) -> int:
        """Tokens of the right option."""
        return len(self.options[self.answer])


@dataclass(frozen=True)
class Batch:
    """Padded tensors for one forward pass.

    causal: `input_ids` (n, length) is prompt then target, `labels` the same with everything but
    the target ignored. seq2seq: `input_ids` is the prompt, `labels` (n, target) the target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def inputs(self, kind: str) -> dict[str, Tensor]:
        """Arguments of the forward pass; a seq2seq model makes its decoder inputs from the labels."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {**inputs, "labels": self.labels} if kind == "seq2seq" else inputs


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with what a model demands of a sequence."""

    tokenizer: Tokenizer
    kind: str
    positions: int | None

    @property
    def pad(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else (eos if eos is not None else 0)

    def text(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids)

    def encode(self, task: Task, form: PromptForm, row: Row) -> Encoded:
        """One row in tokens; a passage too long for the model's positions is cut, nothing else.

        Raises DataError for options that are empty or equal in tokens, and TooLong for a row that no cut makes fit.
        """
        options = self._options(form, row)
        longest = max((len(option) for option in options), default=0)
        if form.generate is not None:
            longest = max(longest, form.max_new_tokens)
        if self.kind != "causal":
            longest = 0
        prompt = self._prompt(row.prompt)
        if not prompt:
            raise DataError(f"{row.where}: the prompt has no tokens; a causal model needs at least one")
        if self.positions is not None and len(prompt) + longest > self.positions:
            prompt = self._cut(task, form, row, self.positions - longest)
        return Encoded(prompt, options, row.answer if form.generate is None else 0, row)

    def encode_all(self, task: Task, form: PromptForm, rows: Sequence[Row]) -> list[Encoded]:
        """Rows in tokens. Raises DataError as `encode`; of rows too long it names the first, and how many more are."""
        found: list[Encoded] = []
        long: list[TooLong] = []
        for row in rows:
            try:
                found.append(self.encode(task, form, row))
            except TooLong as error:
                long.append(error)
        if long:
            more = f" ({len(long) - 1:,} more of {len(rows):,} rows are too long)" if len(long) > 1 else ""
            raise TooLong(f"{long[0]}{more}") from long[0]
        return found

    def _options(self, form: PromptForm, row: Row) -> tuple[tuple[int, ...], ...]:
        if form.generate is not None:
            texts = () if row.target is None else (row.target,)
            eos = self.tokenizer.eos_token_id
            end = () if eos is None else (eos,)
        else:
            texts, end = row.options, self._end()
        words = [self.text(text) for text in texts]
        _check_options(row.where, texts, words)
        if form.options_from is None:  # options that the data lists may be the same tokens: the first of them wins
            _check_told_apart(row.where, texts, words, self.tokenizer.unk_token_id)
        return tuple((*word, *end) for word in words)

    def _prompt(self, text: str) -> tuple[int, ...]:
        return (*self.text(text), *self._end())

    def _end(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return (eos,) if self.kind == "seq2seq" and eos is not None else ()

    def _cut(self, task: Task, form: PromptForm, row: Row, room: int) -> tuple[int, ...]:
        if task.passage is not None:
            words = passage_of(task, row).split()
            low, high = 0, len(words)
            while low < high:  # the most words of the passage that fit
                middle = (low + high + 1) // 2
                ids = self._prompt(refill(task, form, row, " ".join(words[:middle])))
                low, high = (middle, high) if len(ids) <= room else (low, middle - 1)
            ids = self._prompt(refill(task, form, row, " ".join(words[:low])))
            if len(ids) <= room:
                return ids
        need = len(self._prompt(row.prompt))
        raise TooLong(
            f"{row.where}: the prompt takes {need} tokens but "
            f"{_limit(room, self.positions or 0, self._remedy(task, form, row))}"
        )

    def _remedy(self, task: Task, form: PromptForm, row: Row) -> str:
        if task.passage is None:
            return "shorten the prompt, or name the field that may be cut as the task's `passage`"
        least = len(self._prompt(refill(task, form, row, "")))
        return (
            f"without its passage, '{task.passage}', it still takes {least}; raise max_length, "
            "take a model with more positions, or leave the row out"
        )


def _check_options(where: str, texts: Sequence[str], options: Sequence[tuple[int, ...]]) -> None:
    for text, ids in zip(texts, options, strict=True):
        if not ids:
            raise DataError(f"{where}: option '{text}' has no tokens")


def _check_told_apart(
    where: str, texts: Sequence[str], options: Sequence[tuple[int, ...]], unknown: int | None
) -> None:
    for i, ids in enumerate(options):
        if ids in options[:i]:
            other = texts[options.index(ids)]
            why = " (unknown to the tokenizer)" if unknown is not None and unknown in ids else ""
            raise DataError(
                f"{where}: options '{other}' and '{texts[i]}' are the same tokens{why}; "
                "choose words that the tokenizer tells apart"
            )


def collate(encoder: Encoder, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Batch:
    """Pad (prompt, target) pairs on the right."""
    if encoder.kind == "causal":
        sequences = [[*prompt, *target] for prompt, target in pairs]
        labels = [[IGNORE] * len(prompt) + list(target) for prompt, target in pairs]
    else:
        sequences = [list(prompt) for prompt, _ in pairs]
        labels = [list(target) for _, target in pairs]
    return Batch(
        pad_right(sequences, encoder.pad),
        pad_right([[1] * len(sequence) for sequence in sequences], 0),
        pad_right(labels, IGNORE),
    )


def gold(encoder: Encoder, rows: Sequence[Encoded]) -> Batch:
    """A training batch: every row with its right option."""
    return collate(encoder, [(row.prompt, row.options[row.answer]) for row in rows])


def unlabelled(encoder: Encoder, rows: Sequence[Encoded]) -> Batch:
    """Prompts alone: no answer is in it. A seq2seq model's decoder reads its start mark, and nothing else."""
    return collate(encoder, [(row.prompt, () if encoder.kind == "causal" else (encoder.pad,)) for row in rows])


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of tokens as one tensor (n, longest row), filled up with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _limit(room: int, positions: int, remedy: str) -> str:
    """What keeps a prompt of this room from being longer, and what to do; where the answer leaves none, about that."""
    if room > 0:
        return f"the model has room for {room} (its positions, or max_length, less the longest option); {remedy}"
    return (
        f"the answer alone may take {positions - room} of {positions} (the model's positions, or max_length); lower "
        "max_new_tokens or shorten the options, raise max_length, or take a model with more positions"
    )
