"""Prompts read once, their keys and values kept, so that each of a row's options costs its own tokens only."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from plugbridge.models import last_positions
from plugbridge.tasks.encode import IGNORE, Batch, Encoder, collate, pad_right


@dataclass(frozen=True)
class Reading:
    """What a model keeps of n prompts, each with an opening of o tokens that all of the row's options begin with.

    `logits` (n, 1 + o, vocabulary) predict the opening and what comes after it. `mask` (n, read) says which
    positions are no padding: of the cache, or of `states`, the encoder's (seq2seq only). `after` (n,) is the position
    of the next token (causal only). A method's virtual tokens are part of all of them.
    """

    logits: Tensor
    cache: Cache
    mask: Tensor
    after: Tensor | None = None
    states: Tensor | None = None


def base_of(model: nn.Module) -> PreTrainedModel | None:
    """The model that can go on from a cache, with a module's layers in it; None if this is another kind of network."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base if isinstance(base, PreTrainedModel) else None


def answer_inputs(batch: Batch, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a forward pass, and where among its logits each row's first label is predicted, (n,).

    A causal model's head runs only where some row's is: the states elsewhere are of no use.
    """
    inputs, first = batch.inputs(kind), (batch.labels != IGNORE).int().argmax(-1)
    if kind != "causal":
        return inputs, first
    places, at = (first - 1).unique(return_inverse=True)  # the state before a token predicts it
    # counted from the end: virtual tokens in front shift nothing
    return {**inputs, "logits_to_keep": places - batch.labels.shape[1]}, at


def read_prompts(
    model: nn.Module, encoder: Encoder, prompts: Sequence[tuple[int, ...]], openings: Tensor, device: torch.device
) -> Reading:
    """One forward pass over the prompts and their openings, (n, o) tokens."""
    if encoder.kind == "seq2seq":
        batch = collate(encoder, [(prompt, ()) for prompt in prompts]).to(device)
        return _read_seq2seq(model, batch, openings.to(device))
    texts = [(*prompt, *opening) for prompt, opening in zip(prompts, openings.tolist(), strict=True)]
    return _read_causal(model, collate(encoder, [(text, ()) for text in texts]).to(device), openings.shape[1])


def _read_causal(model: nn.Module, batch: Batch, opening: int) -> Reading:
    tokens, mask = batch.input_ids, batch.attention_mask
    lengths = mask.sum(-1)
    # counted from the end: virtual tokens in front shift nothing, and the head runs on the last positions only
    ends = (lengths - tokens.shape[1] - 1)[:, None] + torch.arange(-opening, 1, device=tokens.device)
    kept = last_positions(-int(ends.min()), tokens.device)
    output = model(input_ids=tokens, attention_mask=mask, use_cache=True, logits_to_keep=kept)
    logits = output.logits[torch.arange(len(tokens), device=tokens.device)[:, None], ends]
    virtual = output.past_key_values.get_seq_length() - tokens.shape[1]
    return Reading(logits, output.past_key_values, _behind_virtual(mask, virtual), after=lengths + virtual)


def _read_seq2seq(model: nn.Module, batch: Batch, openings: Tensor) -> Reading:
    config: Any = model.config
    start = openings.new_full((len(openings), 1), config.decoder_start_token_id)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=torch.cat([start, openings], dim=1),
        use_cache=True,
    )
    states: Tensor = output.encoder_last_hidden_state
    mask = _behind_virtual(batch.attention_mask, states.shape[1] - batch.attention_mask.shape[1])
    return Reading(output.logits, output.past_key_values, mask, states=states)


def _behind_virtual(mask: Tensor, count: int) -> Tensor:
    """The mask with `count` virtual tokens in front of it."""
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def go_on(base: PreTrainedModel, reading: Reading, rows: Tensor, continuations: Sequence[tuple[int, ...]]) -> Tensor:
    """Logits of what follows each token of each continuation. `rows` (m,) are the prompts that they continue.

    Continuations are padded on the right; returns (m, longest continuation, vocabulary).
    """
    tokens = pad_right(continuations, 0).to(rows.device)
    cache = deepcopy(reading.cache)  # a forward pass appends to it, and another one may start from the same prompts
    cache.batch_select_indices(rows)
    mask = reading.mask[rows]
    if reading.states is not None:
        states = (reading.states[rows],)
        output = base(encoder_outputs=states, attention_mask=mask, decoder_input_ids=tokens, past_key_values=cache)
        return output.logits
    assert reading.after is not None
    steps = pad_right([range(len(tokens)) for tokens in continuations], 0).to(rows.device)  # padding takes no position
    output = base(
        input_ids=tokens,
        attention_mask=torch.cat([mask, torch.ones_like(tokens)], dim=1),
        position_ids=reading.after[rows, None] + steps,
        past_key_values=cache,
    )
    return output.logits
