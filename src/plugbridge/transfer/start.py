"""Where coupling starts: the module and the plug that carries it, and which small layer each large layer copies.

`random` plugs are the paper's. `ridge` and `procrustes` fit the plug to the states of both models on
the same tokens. `fresh` takes nothing of the small model: the method's own initialisation at large width
(Jin et al. 2023, Table 8's "BM").
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tensors.align import linear_cka, procrustes, ridge
from plugbridge.tensors.axes import parse
from plugbridge.transfer.plug import (
    LayerMap,
    Plug,
    duplicate,
    model_dim,
    plug_key,
    plug_shapes,
    random_plug,
    uniform_layer_map,
)
from plugbridge.tuners.module import Module, attach, pattern_of, state_of, unpack
from plugbridge.tuners.table import Method, MethodSettings

StartKind = Literal["random", "ridge", "procrustes", "fresh"]
MapKind = Literal["uniform", "cka"]


@dataclass(frozen=True)
class Start:
    """A module with one entry per large layer, the plug that carries it, and the layer map.

    `small` is the layout the module is at: the large one's for a fresh module, which needs no plug.
    """

    module: Module
    plug: Plug
    small: Layout
    layer_map: LayerMap


@dataclass
class States:
    """A model's states on some tokens, (tokens, width) each.

    `inputs` and `outputs` of linear layers and `outputs` of past keys and values (site "") by
    (stack, layer, site); `blocks` are the outputs of whole layers.
    """

    inputs: dict[tuple[str, int, str], Tensor] = field(default_factory=dict[tuple[str, int, str], Tensor])
    outputs: dict[tuple[str, int, str], Tensor] = field(default_factory=dict[tuple[str, int, str], Tensor])
    blocks: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])


def fresh_start(method: Method, settings: MethodSettings, large: Layout, model: PreTrainedModel) -> Start:
    """The method's own initialisation on the large model, which is used up: peft wraps it in place."""
    wrapped, _ = attach(model, method, large, settings)
    module = unpack(method, large, state_of(wrapped))
    return Start(module, {}, large, {stack: list(range(count)) for stack, count in large.layers.items()})


def small_start(
    method: Method,
    kind: StartKind,
    map_kind: MapKind,
    small: Layout,
    large: Layout,
    tuned: Module,
    states: tuple[States, States] | None,
    seed: int,
) -> Start:
    """The small model's tuned module, duplicated to the large model's layers, with a plug to start from.

    `states` are the small and the large model's on the same tokens; only random plugs on a uniform
    map do without.
    """
    layers = uniform_layer_map(small, large)
    if map_kind == "cka":
        assert states is not None
        layers = cka_layer_map(small, large, *states)
    module = duplicate(tuned, layers)
    plug = random_plug(plug_shapes(method, small, large, module), torch.Generator().manual_seed(seed))
    if kind in ("ridge", "procrustes"):
        assert states is not None
        plug = fitted_plug(method, kind, small, large, module, layers, *states)
    return Start(module, plug, small, layers)


def cka_layer_map(small: Layout, large: Layout, narrow: States, wide: States) -> LayerMap:
    """For each large layer the small layer most like it, in order: the sum of CKAs is the largest possible."""
    found: LayerMap = {}
    for stack, count in large.layers.items():
        alike = [
            [linear_cka(narrow.blocks[stack, i], wide.blocks[stack, j]) for i in range(small.layers[stack])]
            for j in range(count)
        ]
        found[stack] = best_monotone(alike)
    return found


def best_monotone(alike: Sequence[Sequence[float]]) -> list[int]:
    """The non-decreasing choice of one column per row with the largest sum; the lower column of equals."""
    columns = len(alike[0])
    total = list(alike[0])
    came: list[list[int]] = []
    for row in alike[1:]:
        best = [max(range(i + 1), key=lambda k: total[k]) for i in range(columns)]
        came.append(best)
        total = [total[best[i]] + row[i] for i in range(columns)]
    last = max(range(columns), key=lambda i: total[i])
    path = [last]
    for best in reversed(came):
        path.append(best[path[-1]])
    return path[::-1]


def reads(method: Method, tensor: str) -> bool:
    """Whether a module's tensor multiplies the model's states; else it makes them.

    A map written (inner, width) reads, one written (width, inner) writes, and a stacked tensor is
    states itself.
    """
    return not method.stacked and any("{" in name for name in parse(method.tensors[tensor])[-1])


def fitted_plug(
    method: Method,
    kind: StartKind,
    small: Layout,
    large: Layout,
    module: Module,
    layers: LayerMap,
    narrow: States,
    wide: States,
) -> Plug:
    """A plug for each group from the states where the group sits, all its layers together.

    A tensor that reads must find in the large model's states what it found in the small model's:
    the map brings large states to small ones. A tensor that writes needs the opposite map. What is
    written is a change of states, so there their mean is taken off.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    stacks: dict[str, int] = {}
    kinds: dict[str, bool] = {}
    for slot in module:
        dim = model_dim(large, pattern_of(method, large, slot))
        key = plug_key(slot)
        if dim is None or "bias" in slot.tensor:  # a weight and its bias share one map
            continue
        side = "inputs" if "{in}" in method.tensors[slot.tensor] else "outputs"
        x: Tensor = getattr(narrow, side)[slot.stack, layers[slot.stack][slot.layer], slot.site]
        y: Tensor = getattr(wide, side)[slot.stack, slot.layer, slot.site]
        kinds[key] = reads(method, slot.tensor)
        stacks[key] = plug_shapes(method, small, large, {slot: module[slot]})[key][0]
        pairs.setdefault(key, []).append((x, y) if kinds[key] else (x - x.mean(0), y - y.mean(0)))
    plug: Plug = {}
    for key, found in pairs.items():
        x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
        maps = [
            fitted_map(kind, a, b, kinds[key])
            for a, b in zip(x.chunk(stacks[key], -1), y.chunk(stacks[key], -1), strict=True)
        ]
        plug[key] = torch.stack(maps).float().contiguous()
    return plug


def fitted_map(kind: StartKind, x: Tensor, y: Tensor, reading: bool) -> Tensor:
    """One plug map (large, small) from small states x: (n, small) and large states y: (n, large)."""
    if kind == "procrustes":
        return procrustes(y, x)
    return ridge(y, x) if reading else ridge(x, y).mT


@torch.no_grad()
def record_states(model: PreTrainedModel, layout: Layout, encoder: Encoder, rows: Iterable[Encoded]) -> States:
    """Run rows, one at a time, and keep what linear layers read and write, what blocks write, and the cache."""
    kept = States()
    lists: dict[tuple[str, Any], list[Tensor]] = {}
    with _hooks(model, layout, lists):
        for row in rows:
            batch = gold(encoder, [row]).to(model.device)
            output = model(**batch.inputs(encoder.kind), use_cache=True)
            cache = output.past_key_values
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            reader = layout.family.prefix.stack
            for layer in range(layout.layers[reader]):
                held = cast(Any, cache.layers[layer])
                pair: tuple[Tensor, Tensor] = (held.keys, held.values)
                both = [part.transpose(1, 2).flatten(2) for part in pair]  # (1, length, heads * head_dim)
                lists.setdefault(("outputs", (reader, layer, "")), []).append(torch.cat(both, -1).flatten(0, 1).cpu())
    for (kind, key), parts in lists.items():
        getattr(kept, kind)[key] = torch.cat(parts).float()
    return kept


@contextmanager
def _hooks(model: nn.Module, layout: Layout, lists: dict[tuple[str, Any], list[Tensor]]) -> Generator[None]:
    def keep(kind: str, key: Any, x: Tensor) -> None:
        lists.setdefault((kind, key), []).append(x.detach().reshape(-1, x.shape[-1]).cpu())

    def on_linear(key: tuple[str, int, str]) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            keep("inputs", key, inputs[0])
            keep("outputs", key, output)

        return hook

    def on_block(key: tuple[str, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            keep("blocks", key, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as hooks:
        for name, stack in layout.family.stack.items():
            sites = {site for roles in stack.roles.values() for site in roles}
            for layer in range(layout.layers[name]):
                path = stack.path.format(layer)
                block = model.get_submodule(path)
                hooks.callback(block.register_forward_hook(on_block((name, layer))).remove)
                for site in sites:
                    linear = block.get_submodule(site)
                    hooks.callback(linear.register_forward_hook(on_linear((name, layer, site))).remove)
        yield
