"""What a model's layers read and write while it runs one row, seen as it goes by."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.models import few_logits
from plugbridge.tasks.encode import Encoded, Encoder, gold


class Place(NamedTuple):
    """Where states are: what a linear layer reads (`inputs`) or writes (`outputs`), or a whole block writes.

    `site` is the linear layer's path in its block; `outputs` of no site are the block's past keys and values.
    """

    kind: Literal["inputs", "outputs", "blocks"]
    stack: str
    layer: int
    site: str = ""


States = dict[Place, Tensor]
"""A row's states, (tokens, width) each."""
See = Callable[[Place, Tensor], None]
BothRows = Callable[[Collection[Place], Collection[Place]], Iterator[tuple[States, Callable[[See], None]]]]
"""Rows that a small and a large model read: given the places of interest in each, an iterator over rows of the small
model's states and a function that runs the large model and shows its own, place by place."""


@torch.no_grad()
def watch(
    model: PreTrainedModel, layout: Layout, encoder: Encoder, row: Encoded, places: Collection[Place], see: See
) -> None:
    """Run a row and its right option; `see` is given the states (tokens, width) at each place when they are there.

    They are in the model's precision, on the CPU.
    """

    def show(place: Place, x: Tensor) -> None:
        see(place, x.detach().reshape(-1, x.shape[-1]).cpu())

    past = [place for place in places if place.kind == "outputs" and not place.site]
    with ExitStack() as hooks:
        for place in places:
            if place not in past:
                path = layout.family.stack[place.stack].path.format(place.layer)
                block = model.get_submodule(path)
                module = block.get_submodule(place.site) if place.site else block
                hooks.callback(module.register_forward_hook(_hook(place, show)).remove)
        batch = gold(encoder, [row]).to(model.device)
        inputs = {**batch.inputs(encoder.kind), **few_logits(model, encoder.kind)}
        cache = model(**inputs, use_cache=bool(past)).past_key_values
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    for place in past:
        held = cast(Any, cache).layers[place.layer]
        pair: tuple[Tensor, Tensor] = (held.keys, held.values)
        show(place, torch.cat([part.transpose(1, 2).flatten(2) for part in pair], -1))  # (1, length, heads * head_dim)


def _hook(place: Place, show: See) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if place.kind == "inputs":
            show(place, inputs[0])
        else:
            show(place, output[0] if isinstance(output, tuple) else output)

    return hook
