"""Rows to token ids, and batches of them to padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from plugbridge.config.inputs import Score
from plugbridge.errors import DataError, ModelError
from plugbridge.models import Tokenizer, tokenizer_errors
from plugbridge.parsing import shown
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row, passage_of, refill
from plugbridge.tasks.spec import Task

IGNORE = -100
CONTEXT = 40
"""Characters of a prompt, back to a blank, that an option is read behind: no token reaches from word to word."""
LONGEST = 400
"""Characters of that in texts without blanks, such as Chinese."""
SAMPLE = "a"
"""A text to see what a tokenizer puts around one."""
REMEMBERED = 10_000
"""Options behind prompts' ends that an encoder remembers at most."""


class TooLong(DataError):
    """A row that does not fit the model, however much of its passage is cut."""


@dataclass(frozen=True)
class Encoded:
    """One row in tokens, and the row itself. For seq2seq models every option ends with the end-of-sequence token.

    Where all of a row's options are single tokens it does not: they are told apart without, and training and scoring
    are of the same.

    Where the model writes its answer, the one option is the text that training writes, with an end mark for causal
    models too. `score` is what of an option's tokens choices are made on, and so what training raises. `kept` is the
    share of its passage that is left, `fused` says that the tokenizer would make one token of the prompt's end and an
    option's beginning. Equal tokens are equal rows, whatever row they came from.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int
    row: Row | None = field(default=None, compare=False, repr=False)
    score: Score = field(default="sum", compare=False)
    kept: float = field(default=1.0, compare=False)
    fused: bool = field(default=False, compare=False)

    @property
    def target(self) -> tuple[int, ...]:
        """What training raises: the right option's tokens, the first alone where choices are made on it."""
        right = self.options[self.answer]
        return right[:1] if self.score == "first" else right

    @property
    def bare(self) -> bool:
        """Whether all options are single tokens."""
        return all(len(option) == 1 for option in self.options)

    @property
    def divisor(self) -> int:
        """What the summed log-probability of the target is divided by, to be what choices are made on."""
        return len(self.target) if self.score == "mean" else 1

    @property
    def weight(self) -> int:
        """What the row counts for in the loss of several rows.

        The tokens of its longest option where they are summed, so that a loss is about one token's; else 1.
        """
        return max(map(len, self.options)) if self.score == "sum" else 1


@dataclass(frozen=True)
class Batch:
    """Padded tensors for one forward pass.

    causal: `input_ids` (n, length) is prompt then target, `labels` the same with everything but
    the target ignored. seq2seq: `input_ids` is the prompt, `labels` (n, target) the target.
    `weights` (n,) are those of the rows' summed log-likelihoods in the loss; without them every target token of the
    batch counts the same.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def to(self, device: str | torch.device) -> "Batch":
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), weights)

    def inputs(self, kind: str) -> dict[str, Tensor]:
        """Arguments of the forward pass; a seq2seq model makes its decoder inputs from the labels."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {**inputs, "labels": self.labels} if kind == "seq2seq" else inputs


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with what a model demands of a sequence.

    With `special`, prompts begin with the special tokens that the tokenizer puts in front of a text (`front`).
    """

    tokenizer: Tokenizer
    kind: str
    positions: int | None
    special: bool = True
    seams: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = field(default_factory=dict[Any, Any], compare=False,
                                                                       repr=False)  # fmt: skip

    @cached_property
    def front(self) -> tuple[int, ...]:
        """What prompts begin with: the mark of a text's beginning (BOS), with most tokenizers, or nothing."""
        return front_of(self.tokenizer) if self.special else ()

    @property
    def pad(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else (eos if eos is not None else 0)

    def text(self, text: str) -> tuple[int, ...]:
        with tokenizer_errors("read", text):
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, task: Task, form: PromptForm, row: Row) -> Encoded:
        """One row in tokens; a passage too long for the model's positions is cut, nothing else.

        Raises DataError for a prompt without tokens, or options that are empty or equal in tokens, and TooLong for a
        row that no cut makes fit.
        """
        prompt, kept = self._prompt(row.prompt), 1.0
        if len(prompt) <= len(self.front) + len(self._end()):
            raise DataError(f"{row.where}: the prompt has no tokens of its own; a model needs at least one")
        options, fused = self._options(form, row, row.prompt)
        room = self._room(form, options)
        while room is not None and len(prompt) > room:
            text, kept = self._cut(task, form, row, room)
            prompt = self._prompt(text)
            options, fused = self._options(form, row, text)  # behind another end they may be other tokens
            room = min(room, self._room(form, options) or room)
        right = row.answer if form.generate is None else 0
        return Encoded(prompt, options, right, row, form.decision, kept, fused)

    def _room(self, form: PromptForm, options: Sequence[tuple[int, ...]]) -> int | None:
        """Tokens that a prompt may have."""
        if self.positions is None or self.kind != "causal":
            return self.positions
        longest = max((len(option) for option in options), default=0)
        return self.positions - (longest if form.generate is None else max(longest, form.max_new_tokens))

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

    def _options(self, form: PromptForm, row: Row, prompt: str) -> tuple[tuple[tuple[int, ...], ...], bool]:
        """The row's options behind a prompt, and whether a tokenizer would fuse one with it."""
        if form.generate is not None:
            texts = () if row.target is None else (row.target,)
            eos = self.tokenizer.eos_token_id
            end = () if eos is None else (eos,)
        else:
            texts, end = row.options, self._end()
        found = self._behind(prompt, texts)
        words = [ids for ids, _ in found]
        if form.generate is None and all(len(word) == 1 for word in words):
            end = ()
        _check_options(row.where, texts, words)
        if form.options_from is None:  # options that the data lists may be the same tokens: the first of them wins
            unknown = self.tokenizer.unk_token_id
            if form.decision == "first":
                firsts = [word[:1] for word in words]
                _check_told_apart(row.where, texts, firsts, unknown, "begin with the same token, and `score` is first")
            else:
                _check_told_apart(row.where, texts, words, unknown, "are the same tokens")
        return tuple((*word, *end) for word in words), any(fused for _, fused in found)

    def _prompt(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens, each special one once, whether the text has it written out or not."""
        ids, front, end = self.text(text), self.front, self._end()
        return (*(() if ids[: len(front)] == front else front), *ids, *(() if end and ids[-1:] == end else end))

    def _behind(self, prompt: str, texts: Sequence[str]) -> list[tuple[tuple[int, ...], bool]]:
        """Options' tokens behind a prompt, as the tokenizer gives them for the text as a whole.

        A decoder of its own begins anew. So does an option whose beginning the tokenizer would make one token with the
        prompt's end, which has to be the same before every option; that there is such a token is returned, too.
        """
        end = _end_of(prompt) if self.kind == "causal" else ""
        found = {text: self.seams[end, text] for text in texts if (end, text) in self.seams}
        before = self.text(end) if len(found) < len(texts) else ()
        for text in texts:
            if text not in found:
                whole = self.text(end + text)
                fused = whole[: len(before)] != before or len(whole) == len(before)
                found[text] = (self.text(text) if fused else whole[len(before) :], fused)
                if len(self.seams) >= REMEMBERED:
                    self.seams.clear()
                self.seams[end, text] = found[text]
        return [found[text] for text in texts]

    def _end(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return (eos,) if self.kind == "seq2seq" and eos is not None else ()

    def _cut(self, task: Task, form: PromptForm, row: Row, room: int) -> tuple[str, float]:
        """The row's prompt with as many tokens of its passage as fit, and the share of its letters that they are."""
        if task.passage is not None:
            passage = passage_of(task, row)
            ends = [0, *self._ends(passage, room)]
            low, high = 0, len(ends) - 1
            while low < high:
                middle = (low + high + 1) // 2
                ids = self._prompt(refill(task, form, row, passage[: ends[middle]]))
                low, high = (middle, high) if len(ids) <= room else (low, middle - 1)
            text = refill(task, form, row, passage[: ends[low]])
            if len(self._prompt(text)) <= room:
                return text, ends[low] / max(1, len(passage))
        need = len(self._prompt(row.prompt))
        raise TooLong(
            f"{row.where}: the prompt takes {need} tokens but "
            f"{_limit(room, self.positions or 0, self._remedy(task, form, row))}"
        )

    def _ends(self, text: str, room: int) -> list[int]:
        """Where a text may be cut to fit: behind its tokens, or any letter with a tokenizer that does not tell."""
        tokenizer: Any = self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return list(range(1, len(text) + 1))
        with tokenizer_errors("read", text):
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return sorted({int(end) for _, end in found} - {0})[: max(0, room) + 1]

    def _remedy(self, task: Task, form: PromptForm, row: Row) -> str:
        if task.passage is None:
            return "shorten the prompt, or name the field that may be cut as the task's `passage`"
        least = len(self._prompt(refill(task, form, row, "")))
        return (
            f"without its passage, {shown(task.passage)}, it still takes {least}; raise max_length, "
            "take a model with more positions, or leave the row out"
        )


def front_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts in front of a text. Raises ModelError where it reads it otherwise, too.

    What it appends (an end mark, with some) is no part of a text that goes on.
    """
    with tokenizer_errors("read", SAMPLE):
        bare, whole = (tokenizer.encode(SAMPLE, add_special_tokens=special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    raise ModelError(
        f"the tokenizer reads {SAMPLE!r} as {bare} without special tokens and as {whole} with them; expected the same "
        "tokens between them; set special_tokens: false"
    )


def _end_of(prompt: str) -> str:
    """A prompt's last words, at least `CONTEXT` characters, and no more than `LONGEST` where no blank comes before."""
    start, first = max(0, len(prompt) - CONTEXT), max(0, len(prompt) - LONGEST)
    while start > first and not prompt[start].isspace():
        start -= 1
    return prompt[start:]


def _check_options(where: str, texts: Sequence[str], options: Sequence[tuple[int, ...]]) -> None:
    for text, ids in zip(texts, options, strict=True):
        if not ids:
            raise DataError(f"{where}: option {shown(text)} has no tokens")


def _check_told_apart(
    where: str, texts: Sequence[str], options: Sequence[tuple[int, ...]], unknown: int | None, alike: str
) -> None:
    for i, ids in enumerate(options):
        if ids in options[:i]:
            other = texts[options.index(ids)]
            why = " (unknown to the tokenizer)" if unknown is not None and unknown in ids else ""
            raise DataError(
                f"{where}: options {shown(other)} and {shown(texts[i])} {alike}{why}; choose words that the tokenizer "
                "tells apart"
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
    """A training batch: every row with its right option, weighed so that the loss is of what choices are made on."""
    batch = collate(encoder, [(row.prompt, row.target) for row in rows])
    whole, tokens = sum(row.weight for row in rows), sum(len(row.target) for row in rows)
    if all(whole * row.divisor == tokens for row in rows):
        return batch
    return replace(batch, weights=torch.tensor([1 / (whole * row.divisor) for row in rows], dtype=torch.float64))


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
