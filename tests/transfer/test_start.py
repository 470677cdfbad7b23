"""Where coupling starts: the best layer map, plugs that bring one model's states to the other's, a fresh module."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from itertools import combinations_with_replacement
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import FAMILIES, METHODS, VOCAB, logits_of, make_model, make_tokenizer, randomise
from plugbridge.families.spec import Layout
from plugbridge.memory.alive import Alive
from plugbridge.models import layout_for
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tensors.align import ridge
from plugbridge.transfer.plug import (
    apply_plug,
    duplicate,
    plug_key,
    plug_shapes,
    random_plug,
    uniform_layer_map,
)
from plugbridge.transfer.start import PlugFit, best_monotone, cka_layer_map, fresh_start, reads, small_start
from plugbridge.transfer.states import BothRows, Place, See, States, watch
from plugbridge.tuners.module import Module, Slot, attach, load_state, pack, state_of, unpack
from plugbridge.tuners.table import METHODS as TABLE
from plugbridge.tuners.table import Method, MethodSettings

SETTINGS = MethodSettings(rank=2, alpha=4.0)
GRID = [(family, method) for family in FAMILIES for method in METHODS]
SHAPES = {
    "small": {"hidden": 8, "layers": 2, "heads": 2, "seed": 1},
    "large": {"hidden": 16, "layers": 3, "heads": 4, "seed": 2},
}
ENDS = ((3, 1), (4, 5, 1))


def _rows(count: int) -> list[Encoded]:
    """Random rows of lengths that differ, with options of lengths that differ."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, len(VOCAB), (4 + i % 5,), generator=generator).tolist() for i in range(count)]
    return [Encoded(tuple(prompt), ENDS, i % 2) for i, prompt in enumerate(prompts)]


def _encoder(layout: Layout) -> Encoder:
    return Encoder(make_tokenizer(), layout.family.kind, None)


@cache
def _module(family: str, method: str, size: str) -> tuple[Layout, Module]:
    """A model's layout and a random module on it."""
    model = make_model(family, **SHAPES[size])
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE[method], layout, SETTINGS)
    randomise(wrapped)
    return layout, unpack(TABLE[method], layout, state_of(wrapped))


def _everywhere(layout: Layout) -> list[Place]:
    """Every place that a method may ask for."""
    found = [Place("blocks", stack, layer) for stack, count in layout.layers.items() for layer in range(count)]
    found += [Place("outputs", layout.family.prefix.stack, i) for i in range(layout.layers[layout.family.prefix.stack])]
    for name, stack in layout.family.stack.items():
        sites = dict.fromkeys(site for roles in stack.roles.values() for site in roles)
        for site in sites:
            for layer in range(layout.layers[name]):
                found += [Place("inputs", name, layer, site), Place("outputs", name, layer, site)]
    return found


def _seen(model: PreTrainedModel, rows: list[Encoded]) -> States:
    """A model's states everywhere on all rows."""
    layout = layout_for(model)
    found: dict[Place, list[Tensor]] = {}
    for row in rows:
        watch(
            model, layout, _encoder(layout), row, _everywhere(layout), lambda at, x: found.setdefault(at, []).append(x)
        )
    return {place: torch.cat(parts) for place, parts in found.items()}


@cache
def _states(family: str, size: str) -> tuple[Layout, States]:
    """A model's layout and its states on rows enough to span every width."""
    model = make_model(family, **SHAPES[size])
    return layout_for(model), _seen(model, _rows(12))


def _as_rows(narrow: States, wide: States) -> BothRows:
    """States of both models as if they were one row's."""

    def rows(small: Collection[Place], large: Collection[Place]) -> Iterator[tuple[States, Callable[[See], None]]]:
        def run(see: See) -> None:
            for place in large:
                see(place, wide[place])

        yield {place: narrow[place] for place in small}, run

    return rows


def _plugged(module: Module, groups: Mapping[str, object]) -> list[Slot]:
    """The slots that a plug map is fitted for: a bias goes with its weight."""
    return [slot for slot in module if plug_key(slot) in groups and "bias" not in slot.tensor]


def _side(method: Method, slot: Slot) -> Literal["inputs", "outputs"]:
    return "inputs" if "{in}" in method.tensors[slot.tensor] else "outputs"


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# the layer map


def test_best_monotone_is_the_best_of_all_that_keep_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in range(1, 6):
        for columns in range(1, 5):
            for _ in range(6):  # few values, so that sums are often equal
                alike = torch.randint(4, (rows, columns), generator=generator).tolist()
                maps = list(combinations_with_replacement(range(columns), rows))
                sums = {m: sum(alike[row][column] for row, column in enumerate(m)) for m in maps}
                best = [m for m in maps if sums[m] == max(sums.values())]
                assert best_monotone(alike) == list(min(best, key=lambda m: m[::-1])), alike


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_mapped_on_itself_layer_by_layer(family: str) -> None:
    layout, states = _states(family, "large")
    assert cka_layer_map(layout, layout, _as_rows(states, states)) == {stack: [0, 1, 2] for stack in layout.layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_mapped_by_what_is_alike_and_not_by_their_number(family: str) -> None:
    small, tuned = _module(family, "lora", "small")
    large = layout_for(make_model(family, hidden=16, layers=5))
    generator = torch.Generator().manual_seed(0)
    source = {stack: [0, 1, 1, 1, 1] for stack in large.layers}
    basis = torch.linalg.qr(_random(16, 8, generator=generator)).Q.mT
    narrow = {Place("blocks", s, i): _random(40, 8, generator=generator) for s in large.layers for i in range(2)}
    wide = {Place("blocks", s, j): 2 * narrow[Place("blocks", s, i)] @ basis for s in source
            for j, i in enumerate(source[s])}  # fmt: skip
    start = small_start(TABLE["lora"], "random", "cka", small, large, tuned, _as_rows(narrow, wide), seed=0)
    wanted = duplicate(tuned, source)
    assert start.layer_map == source != uniform_layer_map(small, large)
    assert start.module.keys() == wanted.keys()
    assert all(torch.equal(start.module[slot], wanted[slot]) for slot in wanted)


# states


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_states_are_the_models_own(family: str) -> None:
    model = make_model(family, **SHAPES["large"])
    layout, rows = layout_for(model), _rows(3)
    states = _seen(model, rows)
    wanted: dict[str, list[list[Tensor]]] = {stack: [] for stack in layout.layers}
    for row in rows:
        target = torch.tensor([row.options[row.answer]])
        with torch.no_grad():
            if layout.family.kind == "causal":
                tokens = torch.tensor([[*row.prompt, *row.options[row.answer]]])
                wanted["decoder"].append(model(tokens, output_hidden_states=True).hidden_states)
            else:
                output = model(torch.tensor([row.prompt]), labels=target, output_hidden_states=True)
                wanted["encoder"].append(output.encoder_hidden_states)
                wanted["decoder"].append(output.decoder_hidden_states)
    for stack, count in layout.layers.items():
        for layer in range(count - 1):  # transformers gives the last one after the final norm only
            blocks = torch.cat([hidden[layer + 1][0] for hidden in wanted[stack]])
            assert torch.allclose(states[Place("blocks", stack, layer)], blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_maps_its_recorded_inputs_to_its_recorded_outputs(family: str) -> None:
    model = make_model(family, **SHAPES["large"])
    layout = layout_for(model)
    states = _seen(model, _rows(3))
    roles = ("attention_input", "attention_output", "mlp_output")
    sites = [(path, layout.place_of(path)) for role in roles for path, _ in layout.sites(role)]
    assert states.keys() == set(_everywhere(layout))
    for path, (place, site) in sites:
        key = (place.stack, place.layer, site)
        with torch.no_grad():
            found = model.get_submodule(path)(states[Place("inputs", *key)])
        assert torch.allclose(states[Place("outputs", *key)], found, rtol=1e-5, atol=1e-5), path
    value = {"gpt2": "attn.c_attn", "llama": "self_attn.v_proj"}.get(layout.family.name, "layer.0.SelfAttention.v")
    for layer in range(3):
        both = states[Place("outputs", layout.family.prefix.stack, layer)].chunk(2, -1)
        parts = states[Place("outputs", layout.family.prefix.stack, layer, value)].split(both[1].shape[-1], -1)
        assert torch.equal(both[1], parts[-1])
        if family == "gpt2":
            assert torch.equal(both[0], parts[1])
        assert not torch.equal(both[0], both[1])


def test_recording_leaves_no_hook_and_no_graph() -> None:
    model = make_model("gpt2")
    states = _seen(model, _rows(2))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert not any(x.requires_grad for x in states.values())


# plugs


@pytest.mark.parametrize(("family", "method"), GRID)
def test_random_plugs_need_no_states(family: str, method: str) -> None:
    """The paper's start: evenly duplicated layers, a random plug that depends on the seed only."""
    small, tuned = _module(family, method, "small")
    large = layout_for(make_model(family, **SHAPES["large"]))
    row = TABLE[method]
    start = small_start(row, "random", "uniform", small, large, tuned, None, seed=4)
    module = duplicate(tuned, uniform_layer_map(small, large))
    plug = random_plug(plug_shapes(row, small, large, module), torch.Generator().manual_seed(4))
    assert (start.small, start.layer_map) == (small, uniform_layer_map(small, large))
    assert start.module.keys() == module.keys()
    assert all(torch.equal(start.module[slot], module[slot]) for slot in module)
    assert start.plug.keys() == plug.keys()
    assert all(torch.equal(start.plug[key], plug[key]) for key in plug)


@pytest.mark.parametrize("kind", ["ridge", "procrustes"])
@pytest.mark.parametrize(("family", "method"), GRID)
def test_fitted_plugs_have_the_plugs_shapes(family: str, method: str, kind: str) -> None:
    small, tuned = _module(family, method, "small")
    _, narrow = _states(family, "small")
    large, wide = _states(family, "large")
    row = TABLE[method]
    start = small_start(row, kind, "uniform", small, large, tuned, _as_rows(narrow, wide), seed=0)
    shapes = plug_shapes(row, small, large, start.module)
    assert {key: tuple(maps.shape) for key, maps in start.plug.items()} == shapes
    for key, maps in start.plug.items():
        assert maps.dtype == torch.float32
        assert bool(maps.isfinite().all())
        if kind == "procrustes":
            assert torch.allclose(maps.mT @ maps, torch.eye(shapes[key][2]).expand(len(maps), -1, -1), atol=1e-5), key
    carried = apply_plug(row, small, large, start.plug, start.module)
    theirs = _module(family, method, "large")[1]
    assert {slot: t.shape for slot, t in carried.items()} == {slot: t.shape for slot, t in theirs.items()}


@pytest.mark.parametrize(("family", "method"), GRID)
def test_between_a_model_and_itself_ridge_is_the_identity(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the span of the states; outside of it nothing is known."""
    monkeypatch.setattr("plugbridge.transfer.start.ridge", partial(ridge, penalty=1e-9))
    layout, tuned = _module(family, method, "small")
    _, states = _states(family, "small")
    row = TABLE[method]
    start = small_start(row, "ridge", "uniform", layout, layout, tuned, _as_rows(states, states), seed=0)
    for slot in _plugged(start.module, start.plug):
        key, side = plug_key(slot), _side(row, slot)
        x = states[Place(side, slot.stack, slot.layer, slot.site)]
        parts = x if reads(row, slot.tensor) else x - x.mean(0)
        for part, matrix in zip(parts.chunk(len(start.plug[key]), -1), start.plug[key], strict=True):
            assert torch.allclose(part @ matrix, part, rtol=0, atol=2e-3 * float(part.std())), key
            assert torch.allclose(part @ matrix.mT, part, rtol=0, atol=2e-3 * float(part.std())), key


@pytest.mark.parametrize("kind", ["ridge", "procrustes"])
@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_plug_finds_the_map_between_the_states_where_its_tensors_sit(
    family: str, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large states that are a map of the small ones, another at each kind of site, shifted where tensors write."""
    monkeypatch.setattr("plugbridge.transfer.start.ridge", partial(ridge, penalty=1e-10))
    row, generator = TABLE[method], torch.Generator().manual_seed(0)
    small, tuned = _module(family, method, "small")
    large = layout_for(make_model(family, **SHAPES["large"]))
    layers = {stack: [0, 1, 1] for stack in large.layers}  # not the uniform map
    module = duplicate(tuned, layers)
    shapes = plug_shapes(row, small, large, module)
    narrow: States = {}
    wide: States = {}
    maps: dict[tuple[str, str, str], Tensor] = {}
    for slot in _plugged(module, shapes):
        stacked, large_width, small_width = shapes[plug_key(slot)]
        side = _side(row, slot)
        at = Place(side, slot.stack, layers[slot.stack][slot.layer], slot.site)
        group = (slot.stack, slot.site, side)  # an adapter reads and writes at one place
        if group not in maps:
            maps[group] = torch.linalg.qr(_random(stacked, large_width, small_width, generator=generator)).Q
            if kind == "ridge":
                maps[group] = maps[group] @ _random(small_width, small_width, generator=generator)
        if at not in narrow:
            narrow[at] = _random(40, stacked * small_width, generator=generator)
        parts = narrow[at].chunk(stacked, -1)
        found = torch.cat([part @ m.mT for part, m in zip(parts, maps[group], strict=True)], -1)
        shift = 0 if method == "adapter" or reads(row, slot.tensor) else 5
        wide[Place(side, slot.stack, slot.layer, slot.site)] = found + shift
    fit = PlugFit(row, small, large, module, layers)
    for states, run in _as_rows(narrow, wide)(*fit.places):
        fit.add(states, run)
    plug = fit.plug(kind)
    assert plug.keys() == shapes.keys()
    for slot in _plugged(module, plug):
        exact = maps[slot.stack, slot.site, _side(row, slot)]
        wanted = torch.linalg.pinv(exact).mT if reads(row, slot.tensor) else exact
        found = plug[plug_key(slot)].double()
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())), slot


@pytest.mark.parametrize("method", METHODS)
def test_more_rows_take_no_more_memory(method: str) -> None:
    small, tuned = _module("gpt2", method, "small")
    models = [make_model("gpt2", **SHAPES[size]) for size in ("small", "large")]
    large = layout_for(models[1])

    def peak(count: int) -> int:
        def rows(narrow: Collection[Place], wide: Collection[Place]) -> Iterator[tuple[States, Callable[[See], None]]]:
            for row in (Encoded(tuple(range(5, 25)), ENDS, 0) for _ in range(count)):
                states: States = {}
                watch(models[0], small, _encoder(small), row, narrow, states.__setitem__)
                yield states, partial(watch, models[1], large, _encoder(large), row, wide)

        with Alive() as alive:
            small_start(TABLE[method], "ridge", "cka", small, large, tuned, rows, seed=0)
        return max(alive.peaks.values())

    assert peak(24) <= peak(12)


# a fresh module


@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_fresh_module_is_the_large_models_and_needs_no_plug(family: str, method: str) -> None:
    row = TABLE[method]
    large, wanted = _module(family, method, "large")
    start = fresh_start(row, SETTINGS, large, make_model(family, **SHAPES["large"]))
    assert (start.plug, start.small) == ({}, large)
    assert start.layer_map == {stack: [0, 1, 2] for stack in large.layers}
    assert {slot: t.shape for slot, t in start.module.items()} == {slot: t.shape for slot, t in wanted.items()}
    carried = apply_plug(row, start.small, large, start.plug, start.module)
    assert carried.keys() == start.module.keys()
    assert all(carried[slot] is tensor for slot, tensor in start.module.items())


@pytest.mark.parametrize(("family", "method"), [pair for pair in GRID if pair[1] != "prefix"])
def test_a_fresh_module_changes_nothing_but_is_not_nothing(family: str, method: str) -> None:
    row, model = TABLE[method], make_model(family, **SHAPES["large"])
    large, before = layout_for(model), logits_of(model)
    start = fresh_start(row, SETTINGS, large, make_model(family, **SHAPES["large"]))
    wrapped, _ = attach(model, row, large, SETTINGS)
    randomise(wrapped)
    assert not torch.allclose(logits_of(wrapped.eval()), before, atol=1e-3)
    load_state(wrapped, pack(row, large, start.module))
    assert torch.equal(logits_of(wrapped), before)
    assert any(float(tensor.abs().sum()) > 0 for tensor in start.module.values())  # else nothing could train
