"""The one writer: greedy continuation of every prompt, by transformers' own `generate` where a network has it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from plugbridge.errors import NotFinite
from plugbridge.models import last_positions, tokenizer_errors
from plugbridge.progress import Progress
from plugbridge.tasks.encode import Encoded, Encoder, collate


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    encoder: Encoder,
    rows: Sequence[Encoded],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
    title: str,
) -> list[str]:
    """What a model writes after every prompt, in the rows' order, without special tokens.

    It is the likeliest token again and again, whatever the checkpoint's `generation_config.json` says of penalties,
    suppressed tokens or sampling. It ends before the tokenizer's end mark, or after `max_new_tokens`. Rows are batched
    by length and padded on the left for causal models; the batching changes no text beyond rounding. Raises NotFinite.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    texts = [""] * len(rows)
    with progress.bar(title, len(rows)) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            prompts = [rows[i].prompt for i in chunk]
            go_on = _continue if hasattr(model, "generate") else _continue_plainly
            try:
                found = go_on(model, encoder, prompts, max_new_tokens, device)
            except NotFinite as error:
                raise NotFinite(f"{title}: {error}") from error
            for i, tokens in zip(chunk, found, strict=True):
                with tokenizer_errors("write", tokens):
                    texts[i] = cast(str, encoder.tokenizer.decode(tokens, skip_special_tokens=True))
            advance(len(chunk))
    return texts


class _Finite(LogitsProcessor):
    """Looks at what transformers' own `generate` chooses from; a NaN would be its first choice."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        _require_finite(scores)
        return scores


def _require_finite(logits: Tensor) -> None:
    """Tokens that are ruled out may be at minus infinity, the likeliest one of a row may not."""
    highest = logits.amax(-1)
    if not bool(highest.isfinite().all()):
        raise NotFinite(f"a likeliest token's logit is {float(highest[~highest.isfinite()][0])}")


def _continue(
    model: Any, encoder: Encoder, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    width, causal = max(map(len, prompts)), encoder.kind == "causal"

    def padded(values: Sequence[int], blank: int) -> list[int]:
        rest = [blank] * (width - len(values))
        return [*rest, *values] if causal else [*values, *rest]

    ids = [padded(prompt, encoder.pad) for prompt in prompts]
    seen = [padded([1] * len(prompt), 0) for prompt in prompts]
    with _greedy(model, encoder, max_new_tokens) as settings:
        found = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(seen, device=device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Finite()]),
            **({"logits_to_keep": last_positions(1, device)} if causal else {}),
        )
    # a decoder's own start token comes first in a seq2seq answer, the prompt in a causal one
    return cast(list[list[int]], found[:, width if causal else 1 :].tolist())


@contextmanager
def _greedy(model: Any, encoder: Encoder, max_new_tokens: int) -> Generator[GenerationConfig]:
    """The whole of how a text is written. While the block runs the model has no settings of its own.

    transformers fills whatever a given configuration leaves open from the model's own.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.pad,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield settings
    finally:
        inner.generation_config = own


def _continue_plainly(
    model: Any, encoder: Encoder, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    """One whole forward pass a token, for a network that keeps no cache (a ladder beside its model)."""
    end = encoder.tokenizer.eos_token_id
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        open_ = [i for i, tokens in enumerate(written) if end not in tokens]
        if not open_:
            break
        pairs = [(prompts[i], tuple(written[i])) for i in open_]
        for i, token in zip(open_, _likeliest(model, encoder, pairs, device), strict=True):
            written[i].append(token)
    return written


def _likeliest(
    model: Any, encoder: Encoder, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device
) -> list[int]:
    """The next token after every prompt and what is written so far, as much for each."""
    if encoder.kind == "causal":
        batch = collate(encoder, [((*prompt, *written), ()) for prompt, written in pairs]).to(device)
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = states[torch.arange(len(pairs), device=device), batch.attention_mask.sum(-1) - 1]
    else:
        batch = collate(encoder, [(prompt, ()) for prompt, _ in pairs]).to(device)
        start = model.config.decoder_start_token_id
        begun = torch.tensor([[start, *written] for _, written in pairs], device=device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = model(**inputs, decoder_input_ids=begun).logits[:, -1]
    _require_finite(logits)
    return cast(list[int], logits.argmax(-1).tolist())
