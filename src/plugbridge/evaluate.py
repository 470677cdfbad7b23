"""The one scorer: likelihood of every option, the likeliest wins."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.errors import NotFinite
from plugbridge.progress import Progress
from plugbridge.reading import answer_inputs, base_of, go_on, read_prompts
from plugbridge.tasks.encode import IGNORE, Batch, Encoded, Encoder, collate, pad_right

Forward = Callable[..., Any]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chosen_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under the logits at its place, zero where ignored. Returns (n, labels)."""
    known = labels != IGNORE
    chosen = labels.masked_fill(~known, 0)
    values = torch.log_softmax(at_least_float32(logits), dim=-1).gather(-1, chosen[..., None]).squeeze(-1)
    return values * known


def log_likelihood(forward: Forward, batch: Batch, kind: str) -> Tensor:
    """Summed log-probability of every row's target. Returns (n,); differentiable.

    A causal model's head runs only where some row of the batch has a target: over prompts it is most of the memory.
    """
    labels, inputs = batch.labels, batch.inputs(kind)
    if kind == "causal":  # the state before a token predicts it
        at = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
        labels = labels[:, 1 + at]
        # counted from the end: virtual tokens in front shift nothing
        logits = forward(**inputs, logits_to_keep=at - batch.labels.shape[1]).logits
    else:
        logits = forward(**inputs).logits
    return _chosen_log_probabilities(logits, labels).sum(-1)


def mean_loss(forward: Forward, batch: Batch, kind: str) -> Tensor:
    """Negative log-likelihood of the targets, as the batch weighs its rows: without weights, the mean over tokens."""
    values = log_likelihood(forward, batch, kind)
    if batch.weights is None:
        return -values.sum() / (batch.labels != IGNORE).sum()
    return -(values * batch.weights.to(values.dtype)).sum()


@torch.no_grad()
def option_scores(
    model: nn.Module,
    encoder: Encoder,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> list[list[float]]:
    """What choices are made on (`Encoded.score`), of every option of every row, in the rows' order.

    That is the sum or the mean of its tokens' log-probabilities, or the first one's.

    A prompt is read once, with what its options begin with, and the options continue from there; where they differ in
    the last token only, that reading scores them all. A network that is no Hugging Face model reads the prompt anew for
    every option. Rows are batched by length; the batching changes no score beyond rounding. `batch_size` is the most
    prompts, and the most options, of one forward pass. Raises NotFinite.
    """
    device = next(model.parameters()).device
    rows = [_decisive(row) for row in rows]
    if (base := base_of(model)) is not None:
        score = partial(_score_shared, base=base)
    else:
        single = all(len(option) == 1 for row in rows for option in row.options)
        score = _score_single if single else _score_full
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    scores: list[list[float]] = [[] for _ in rows]
    with progress.bar(title, len(rows)) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            for i, values in zip(chunk, score(model, encoder, [rows[i] for i in chunk], device), strict=True):
                if bad := [value for value in values if not isfinite(value)]:
                    raise NotFinite(f"{title}: an option's score is {bad[0]}")
                scores[i] = values
            advance(len(chunk))
    return scores


def _decisive(row: Encoded) -> Encoded:
    """A row with the tokens of its options that count: where the first one decides, it alone."""
    if row.score == "first":
        return replace(row, options=tuple(option[:1] for option in row.options))
    return row


def _score_shared(
    model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], device: torch.device, base: PreTrainedModel
) -> list[list[float]]:
    """From one reading of each prompt."""
    opening = min(_opening(row.options) for row in rows)
    openings = pad_right([row.options[0][:opening] for row in rows], 0)
    reading = read_prompts(model, encoder, [row.prompt for row in rows], openings, device)
    owners = torch.tensor([i for i, row in enumerate(rows) for _ in row.options], device=device)
    options = [option[opening:] for row in rows for option in row.options]
    first = torch.tensor([option[0] for option in options], device=device)
    total = _chosen_log_probabilities(reading.logits[:, :-1], openings.to(device)).sum(-1)[owners]
    total += torch.log_softmax(at_least_float32(reading.logits[:, -1]), dim=-1)[owners, first]
    longer = sorted((k for k, option in enumerate(options) if len(option) > 1), key=lambda k: len(options[k]))
    for start in range(0, len(longer), len(rows)):
        chosen = longer[start : start + len(rows)]
        logits = go_on(base, reading, owners[chosen], [options[k][:-1] for k in chosen])
        labels = pad_right([options[k][1:] for k in chosen], IGNORE).to(device)
        total[chosen] += _chosen_log_probabilities(logits, labels).sum(-1)
    total /= torch.tensor([_divisor(row, option) for row in rows for option in row.options], device=device)
    values = iter(total.tolist())
    return [[next(values) for _ in row.options] for row in rows]


def _divisor(row: Encoded, option: tuple[int, ...]) -> int:
    return len(option) if row.score == "mean" else 1


def _opening(options: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all options begin with, each keeping at least one of its own."""
    places = zip(*(option[:-1] for option in options), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, places))


def _score_single(
    model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], device: torch.device
) -> list[list[float]]:
    """Single tokens, from one pass over the prompts."""
    batch = collate(encoder, [(row.prompt, row.options[0]) for row in rows]).to(device)
    inputs, at = answer_inputs(batch, encoder.kind)
    logits: Tensor = model(**inputs).logits[torch.arange(len(rows), device=device), at]
    table = torch.log_softmax(logits.float(), dim=-1)
    return [[float(table[i, option[0]]) for option in row.options] for i, row in enumerate(rows)]


def _score_full(model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], device: torch.device) -> list[list[float]]:
    """Prompt and option in full for every option."""
    pairs = [(row.prompt, option) for row in rows for option in row.options]
    divisors = [_divisor(row, option) for row in rows for option in row.options]
    values: list[float] = []
    step = max(1, len(rows))
    for start in range(0, len(pairs), step):
        total = log_likelihood(model, collate(encoder, pairs[start : start + step]).to(device), encoder.kind)
        values.extend((total / torch.tensor(divisors[start : start + step], device=device)).tolist())
    grouped: list[list[float]] = []
    for row in rows:
        grouped.append(values[: len(row.options)])
        values = values[len(row.options) :]
    return grouped


def predictions(scores: Sequence[Sequence[float]]) -> list[int]:
    """The likeliest option of every row; the first of equals."""
    return [max(range(len(row)), key=lambda i: row[i]) for row in scores]
