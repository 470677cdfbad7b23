"""A linear probe: what can be read from hidden states without changing the model. A reference, not a method."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.progress import Progress
from plugbridge.reading import answer_inputs, go_on, read_prompts
from plugbridge.tasks.encode import Encoded, Encoder, collate

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the squared penalty to choose from."""
MOST = 10_000
"""Training rows that a probe is fitted on at most: every one of them is read."""


@torch.no_grad()
def prompt_states(
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
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with _head_inputs(model, head) as seen, progress.bar(title, len(rows)) as advance:
        for chosen in _by_length(rows, batch_size):
            batch = collate(encoder, [(rows[i].prompt, rows[i].options[0]) for i in chosen]).to(device)
            inputs, at = answer_inputs(batch, encoder.kind)
            model(**inputs, use_cache=False)
            for i, state in zip(chosen, seen.pop()[torch.arange(len(chosen), device=device), at].cpu(), strict=True):
                found[i] = state
            advance(len(chosen))
    return torch.stack(found)


@torch.no_grad()
def option_states(
    model: PreTrainedModel,
    head: str,
    encoder: Encoder,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> list[Tensor]:
    """What the head reads at the end of every option of a row, (options, hidden) each; a prompt is read once.

    The end is an option's last token; of a seq2seq model's options, that before an end mark. `batch_size` is the most
    prompts, and the most options, of one forward pass.
    """
    device = next(model.parameters()).device
    end = 1 if encoder.kind == "seq2seq" else 0
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with _head_inputs(model, head) as seen, progress.bar(title, len(rows)) as advance:
        for chosen in _by_length(rows, batch_size):
            nothing = torch.zeros(len(chosen), 0, dtype=torch.long)
            reading = read_prompts(model, encoder, [rows[i].prompt for i in chosen], nothing, device)
            owners = torch.tensor([k for k, i in enumerate(chosen) for _ in rows[i].options], device=device)
            options = [option[: max(1, len(option) - end)] for i in chosen for option in rows[i].options]
            states: list[Tensor] = []
            for start in range(0, len(options), batch_size):
                part = options[start : start + batch_size]
                seen.clear()
                go_on(model, reading, owners[start : start + batch_size], part)
                last = torch.tensor([len(option) - 1 for option in part], device=device)
                states.append(seen.pop()[torch.arange(len(part), device=device), last].cpu())
            own = torch.cat(states).split([len(rows[i].options) for i in chosen])
            for i, state in zip(chosen, own, strict=True):
                found[i] = state
            advance(len(chosen))
    return found


@contextmanager
def _head_inputs(model: nn.Module, head: str) -> Generator[list[Tensor]]:
    """What the head is given meanwhile, the newest last."""
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _by_length(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Places of the rows in batches of about equal length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def fit_probe(states: Mapping[str, Tensor], right: Mapping[str, Sequence[int]]) -> list[int]:
    """Logistic regression on standardised states; returns the answers for the rows ``chosen``.

    `states` are (rows, width) for ``train``, ``validation`` and ``chosen``, `right` the answers of the
    first two. The penalty with the best validation accuracy is taken, the strongest of equals; with one
    answer in all training rows there is nothing to fit.
    """
    if len(set(right["train"])) == 1:
        return [right["train"][0]] * len(states["chosen"])
    arrays = {name: _array(tensor) for name, tensor in states.items()}

    def answers(model: "Pipeline", name: str) -> list[int]:
        return [int(answer) for answer in model.predict(arrays[name])]

    wanted = [{answer} for answer in right["validation"]]
    return _best(arrays["train"], right["train"], wanted, answers)


def fit_option_probe(states: Mapping[str, Sequence[Tensor]], right: Mapping[str, Sequence[set[int]]]) -> list[int]:
    """Logistic regression of whether an option is right; returns the likeliest option of every row ``chosen``.

    `states` are (options, width) of every row of ``train``, ``validation`` and ``chosen``, `right` the positions of the
    right options of the first two. The penalty is chosen as by `fit_probe`.
    """
    verdicts = [int(k in rights) for rights, own in zip(right["train"], states["train"], strict=True)
                for k in range(len(own))]  # fmt: skip
    if len(set(verdicts)) == 1:
        return [0] * len(states["chosen"])

    def answers(model: "Pipeline", name: str) -> list[int]:
        counts = [len(own) for own in states[name]]
        scores: Any = model.decision_function(_array(torch.cat(list(states[name]))))
        return [int(own.argmax()) for own in np.split(scores, np.cumsum(counts)[:-1])]

    return _best(_array(torch.cat(list(states["train"]))), verdicts, right["validation"], answers)


def _best(
    train: Any, verdicts: Sequence[int], right: Sequence[set[int]], answers: Callable[["Pipeline", str], list[int]]
) -> list[int]:
    """The answers for ``chosen`` of the penalty whose answers for ``validation`` are right most often."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    best, found = -1, list[int]()
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
        model.fit(train, list(verdicts))
        hits = sum(answer in rights for answer, rights in zip(answers(model, "validation"), right, strict=True))
        if hits > best:
            best, found = hits, answers(model, "chosen")
    return found


def _array(tensor: Tensor) -> Any:
    return np.asarray(tensor.double().cpu())
