"""Where coupling starts: the module and the plug that carries it, and which small layer each large layer copies.

`random` plugs are the paper's. `ridge` and `procrustes` fit the plug to the states of both models on
the same tokens. `fresh` takes nothing of the small model: the method's own initialisation at large width
(Jin et al. 2023, Table 8's "BM").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.tensors.align import Likeness, Moments, procrustes, ridge
from plugbridge.tensors.patterns import parse
from plugbridge.transfer.couple import StartKind
from plugbridge.transfer.plug import (
    LayerMap,
    Plug,
    duplicate,
    plug_key,
    plug_shapes,
    random_plug,
    uniform_layer_map,
)
from plugbridge.transfer.states import BothRows, Place, See, States
from plugbridge.tuners.module import Module, attach, state_of, unpack
from plugbridge.tuners.table import Method, MethodSettings

MapKind = Literal["uniform", "cka"]
TOKENS_OF_A_ROW = 32
"""Tokens of a row at most that layers are compared on."""
TOKENS_AT_ONCE = 256
"""Tokens that layers are compared on at once, those of several rows."""


@dataclass(frozen=True)
class Start:
    """A module with one entry per large layer, the plug that carries it, and the layer map.

    `small` is the layout the module is at: the large one's for a fresh module, which needs no plug.
    """

    module: Module
    plug: Plug
    small: Layout
    layer_map: LayerMap


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
    rows: BothRows | None,
    seed: int,
) -> Start:
    """The small model's tuned module, duplicated to the large model's layers, with a plug to start from.

    `rows` are gone through once for a fitted plug and once for a layer map; random plugs on a uniform map do without.
    """
    layers = uniform_layer_map(small, large)
    if map_kind == "cka":
        assert rows is not None
        layers = cka_layer_map(small, large, rows)
    module = duplicate(tuned, layers)
    plug = random_plug(plug_shapes(method, small, large, module), torch.Generator().manual_seed(seed))
    if kind in ("ridge", "procrustes"):
        assert rows is not None
        fit = PlugFit(method, small, large, module, layers)
        for narrow, run in rows(*fit.places):
            fit.add(narrow, run)
        plug = fit.plug(kind)
    return Start(module, plug, small, layers)


def cka_layer_map(small: Layout, large: Layout, rows: BothRows) -> LayerMap:
    """For each large layer the small layer most like it, in order: the sum of CKAs is the largest possible."""
    likeness = LayerLikeness(small, large)
    for narrow, run in rows(*likeness.places):
        likeness.add(narrow, run)
    return likeness.layer_map()


class LayerLikeness:
    """How alike the layers of two models are, from some tokens of every row."""

    def __init__(self, small: Layout, large: Layout) -> None:
        sides = [{s: [Place("blocks", s, i) for i in range(n)] for s, n in m.layers.items()} for m in (small, large)]
        self._narrow, self._wide = sides
        self._sums = {s: Likeness(large.layers[s], small.layers[s]) for s in large.layers}
        self._batch: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {s: [] for s in large.layers}

    @property
    def places(self) -> tuple[list[Place], list[Place]]:
        """The places to see, in the small model and in the large one."""
        narrow, wide = ([place for places in side.values() for place in places] for side in (self._narrow, self._wide))
        return narrow, wide

    def add(self, narrow: States, run: Callable[[See], None]) -> None:
        """Take some tokens of a row: the states of both models on them wait until there are enough to compare."""
        wide: States = {}
        run(lambda place, y: wide.update({place: _some(y)}))
        for stack, waiting in self._batch.items():
            waiting.append(([_some(narrow[at]) for at in self._narrow[stack]], [wide[at] for at in self._wide[stack]]))
            if sum(len(x[0]) for x, _ in waiting) >= TOKENS_AT_ONCE:
                self._compare(stack)

    def _compare(self, stack: str) -> None:
        small, large = ([torch.cat(layer) for layer in zip(*side, strict=True)]
                        for side in zip(*self._batch[stack], strict=True))  # fmt: skip
        self._batch[stack].clear()
        self._sums[stack].add(large, small)

    def layer_map(self) -> LayerMap:
        """The best map of all that was seen; a last batch of less than half the tokens counts only if alone."""
        for stack, waiting in self._batch.items():
            if waiting and (self._sums[stack].empty or sum(len(x[0]) for x, _ in waiting) >= TOKENS_AT_ONCE // 2):
                self._compare(stack)
        return {stack: best_monotone(sums.matrix()) for stack, sums in self._sums.items()}


def _some(x: Tensor) -> Tensor:
    """At most so many tokens of a row, evenly spread."""
    if len(x) <= TOKENS_OF_A_ROW:
        return x
    return x[torch.linspace(0, len(x) - 1, TOKENS_OF_A_ROW).round().long()]


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


class PlugFit:
    """A plug for each group from the states where the group sits, all its layers together, as they go by.

    A tensor that reads must find in the large model's states what it found in the small model's:
    the map brings large states to small ones. A tensor that writes needs the opposite map. What is
    written is a change of states, so there a layer's mean is taken off.
    """

    def __init__(self, method: Method, small: Layout, large: Layout, module: Module, layers: LayerMap) -> None:
        self._sums: dict[str, list[Moments]] = {}
        self._reads: dict[str, bool] = {}
        self._at: dict[Place, list[tuple[Place, str]]] = {}
        shapes = plug_shapes(method, small, large, module)
        for slot in module:
            key = plug_key(slot)
            if key not in shapes or "bias" in slot.tensor:  # a weight and its bias share one map
                continue
            stacked, wide, narrow = shapes[key]
            self._reads[key] = reads(method, slot.tensor)
            ends = (wide, narrow) if self._reads[key] else (narrow, wide)
            if key not in self._sums:  # one for all layers
                self._sums[key] = [Moments(*ends) for _ in range(stacked)]
            side = "inputs" if "{in}" in method.tensors[slot.tensor] else "outputs"
            place = Place(side, slot.stack, slot.layer, slot.site)
            source = Place(side, slot.stack, layers[slot.stack][slot.layer], slot.site)
            self._at.setdefault(place, []).append((source, key))

    @property
    def places(self) -> tuple[list[Place], list[Place]]:
        """The places to see, in the small model and in the large one."""
        return list({source: None for found in self._at.values() for source, _ in found}), list(self._at)

    def add(self, narrow: States, run: Callable[[See], None]) -> None:
        """Count in a row: the small model's states, and the large model's as `run` shows them."""

        def see(place: Place, y: Tensor) -> None:
            for source, key in self._at[place]:
                ends = (y, narrow[source]) if self._reads[key] else (narrow[source], y)
                mean = None if self._reads[key] else place
                parts = (end.chunk(len(self._sums[key]), -1) for end in ends)
                for sums, a, b in zip(self._sums[key], *parts, strict=True):
                    sums.add(a, b, mean)

        run(see)

    def plug(self, kind: StartKind) -> Plug:
        """The plug of all that was seen."""
        return {
            key: torch.stack([fitted_map(kind, part, self._reads[key]).float() for part in sums]).contiguous()
            for key, sums in self._sums.items()
        }


def fitted_map(kind: StartKind, moments: Moments, reading: bool) -> Tensor:
    """One plug map (large, small), of sums from large states to small ones where a tensor reads, else the other way."""
    if kind == "procrustes":
        found = procrustes(moments)
        return found if reading else found.mT
    return ridge(moments) if reading else ridge(moments).mT
