"""The one scorer: likelihood of every option, the likeliest wins."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plugbridge.progress import Progress
from plugbridge.tasks.encode import IGNORE, Batch, Encoded, Encoder, collate

Forward = Callable[..., Any]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_log_probabilities(logits: Tensor, batch: Batch, kind: str) -> Tensor:
    """Log-probability of each label token, zero where ignored. Returns (n, label positions)."""
    labels = batch.labels
    if kind == "causal":  # the logit before a token predicts it
        logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    known = labels != IGNORE
    chosen = labels.masked_fill(~known, 0)
    values = torch.log_softmax(at_least_float32(logits), dim=-1).gather(-1, chosen[..., None]).squeeze(-1)
    return values * known


def log_likelihood(forward: Forward, batch: Batch, kind: str) -> Tensor:
    """Summed log-probability of every row's target. Returns (n,); differentiable."""
    return token_log_probabilities(forward(**batch.inputs(kind)).logits, batch, kind).sum(-1)


def mean_loss(forward: Forward, batch: Batch, kind: str) -> Tensor:
    """Cross-entropy per target token, averaged over the batch's target tokens."""
    total = log_likelihood(forward, batch, kind).sum()
    return -total / (batch.labels != IGNORE).sum()


@torch.no_grad()
def option_scores(
    model: nn.Module,
    encoder: Encoder,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> list[list[float]]:
    """Mean log-probability per token of every option of every row, in the rows' order.

    When all options of all rows are single tokens (before a seq2seq end mark, which then does not
    count), one pass scores them all; else each is run in full. Rows are batched by length; the
    batching changes no score beyond rounding.
    """
    device = next(model.parameters()).device
    end = 1 if encoder.kind == "seq2seq" else 0
    score = _score_single if all(len(o) == 1 + end for row in rows for o in row.options) else _score_full
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    scores: list[list[float]] = [[] for _ in rows]
    with progress.bar(title, len(rows)) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            for i, values in zip(chunk, score(model, encoder, [rows[i] for i in chunk], device), strict=True):
                scores[i] = values
            advance(len(chunk))
    return scores


@torch.no_grad()
def last_states(
    model: nn.Module,
    head: str,
    encoder: Encoder,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> Tensor:
    """What the head reads where a row's answer begins. `head` is its module path. Returns (rows, hidden)."""
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    found: list[Tensor] = []
    try:
        with progress.bar(title, len(rows)) as advance:
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                batch = collate(encoder, [(row.prompt, row.options[0]) for row in chunk]).to(device)
                model(**batch.inputs(encoder.kind))
                found.append(
                    seen.pop()[torch.arange(len(chunk), device=device), _answer_positions(batch, encoder.kind)]
                )
                advance(len(chunk))
    finally:
        handle.remove()
    return torch.cat(found)


def _answer_positions(batch: Batch, kind: str) -> Tensor:
    """Where the first label token is predicted. Returns (n,)."""
    first = (batch.labels != IGNORE).int().argmax(-1)
    return first - 1 if kind == "causal" else first


def _score_single(
    model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], device: torch.device
) -> list[list[float]]:
    batch = collate(encoder, [(row.prompt, row.options[0]) for row in rows]).to(device)
    logits: Tensor = model(**batch.inputs(encoder.kind)).logits
    first = _answer_positions(batch, encoder.kind) + logits.shape[1] - batch.labels.shape[1]
    at = logits[torch.arange(len(rows), device=device), first].float()
    table = torch.log_softmax(at, dim=-1)
    return [[float(table[i, option[0]]) for option in row.options] for i, row in enumerate(rows)]


def _score_full(model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], device: torch.device) -> list[list[float]]:
    pairs = [(row.prompt, option) for row in rows for option in row.options]
    values: list[float] = []
    step = max(1, len(rows))
    for start in range(0, len(pairs), step):
        batch = collate(encoder, pairs[start : start + step]).to(device)
        total = log_likelihood(model, batch, encoder.kind)
        values.extend((total / (batch.labels != IGNORE).sum(-1)).tolist())
    grouped: list[list[float]] = []
    for row in rows:
        grouped.append(values[: len(row.options)])
        values = values[len(row.options) :]
    return grouped


def predictions(scores: Sequence[Sequence[float]]) -> list[int]:
    """The likeliest option of every row; the first of equals."""
    return [max(range(len(row)), key=lambda i: row[i]) for row in scores]
