"""The one writer: greedy continuation of every prompt, by transformers' own `generate`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from plugbridge.models import last_positions
from plugbridge.progress import Progress
from plugbridge.tasks.encode import Encoded, Encoder


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

    It ends before the tokenizer's end mark, or after `max_new_tokens`. Rows are batched by length and padded on the
    left for causal models; the batching changes no text beyond rounding.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    texts = [""] * len(rows)
    with progress.bar(title, len(rows)) as advance:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            prompts = [rows[i].prompt for i in chunk]
            for i, tokens in zip(chunk, _continue(model, encoder, prompts, max_new_tokens, device), strict=True):
                texts[i] = cast(str, encoder.tokenizer.decode(tokens, skip_special_tokens=True))
            advance(len(chunk))
    return texts


def _continue(
    model: Any, encoder: Encoder, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    width, causal = max(map(len, prompts)), encoder.kind == "causal"

    def padded(values: Sequence[int], blank: int) -> list[int]:
        rest = [blank] * (width - len(values))
        return [*rest, *values] if causal else [*values, *rest]

    ids = [padded(prompt, encoder.pad) for prompt in prompts]
    seen = [padded([1] * len(prompt), 0) for prompt in prompts]
    found = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(seen, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.pad,
        **({"logits_to_keep": last_positions(1, device)} if causal else {}),
    )
    # a decoder's own start token comes first in a seq2seq answer, the prompt in a causal one
    return cast(list[list[int]], found[:, width if causal else 1 :].tolist())
