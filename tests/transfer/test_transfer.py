"""Plug, down and fold: identities change nothing, folding equals composing, gradients reach every part."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from conftest import FAMILIES, METHODS, logits_of, make_model, make_tokenizer, pairwise, randomise
from plugbridge.errors import ConfigError
from plugbridge.models import layout_for
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import magnitude
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.transfer.couple import MODES, find_mode
from plugbridge.transfer.coupling import Coupling, bridge_state, require_gradients
from plugbridge.transfer.down import apply_down, start_down
from plugbridge.transfer.fold import fold
from plugbridge.transfer.plug import (
    apply_plug,
    duplicate,
    plug_key,
    plug_shapes,
    random_plug,
    uniform_layer_map,
)
from plugbridge.tuners.module import attach, load_state, pack, save, state_of, unpack
from plugbridge.tuners.table import METHODS as TABLE
from plugbridge.tuners.table import MethodSettings

SETTINGS = MethodSettings(rank=2, alpha=4.0)
GRID = [(family, method) for family in FAMILIES for method in METHODS]


@cache
def _tuned(family: str, method: str, **shape):
    """A small model's layout and a random module on it, in float64."""
    model = make_model(family, **shape)
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE[method], layout, SETTINGS)
    randomise(wrapped)
    state = {key: tensor.double() for key, tensor in state_of(wrapped).items()}
    return layout, unpack(TABLE[method], layout, state)


def coupling_of(
    family: str, method: str, down: str = "select", reduction: float = 2, large_model: PreTrainedModel | None = None
) -> Coupling:
    if large_model is not None:
        return _coupled(family, method, down, reduction, large_model)
    made, state = _coupled_once(family, method, down, reduction)
    torch.set_rng_state(state)
    copies = {
        part: {key: tensor.detach().clone() for key, tensor in getattr(made, part).items()}
        for part in ("module", "plug", "down")
    }
    coupling = replace(made, **copies, bridge=copy.deepcopy(made.bridge), ladder={}, first={}, still=set())
    require_gradients(coupling)
    return coupling


@cache
def _coupled_once(family: str, method: str, down: str, reduction: float) -> tuple[Coupling, torch.Tensor]:
    """A coupling that is only copied, and the generator's state after it."""
    return _coupled(family, method, down, reduction, None), torch.get_rng_state()


def _coupled(family: str, method: str, down: str, reduction: float, large_model: PreTrainedModel | None) -> Coupling:
    small, module = _tuned(family, method, hidden=8, layers=1, heads=2)
    if large_model is None:
        large_model = make_model(family, hidden=16, layers=2, heads=4, seed=3)
    large = layout_for(large_model)
    row = TABLE[method]
    module = {s: t.float() for s, t in duplicate(module, uniform_layer_map(small, large)).items()}
    plan = plan_bridge(large, magnitude(large_model, large), reduced_sizes(large, reduction))
    generator = torch.Generator().manual_seed(0)
    coupling = Coupling(
        method=row, settings=SETTINGS, small=small, large=large, plan=plan,
        bridge=prune_model(large_model, large, plan, {}),
        encoder=Encoder(make_tokenizer(), large.family.kind, None), module=module,
        plug=random_plug(plug_shapes(row, small, large, module), generator),
        down=start_down(down, large, plan, row, module), train_bridge=True,
    )  # fmt: skip
    require_gradients(coupling)
    return coupling


ROWS = [Encoded((8, 9, 10), ((3, 1), (4, 1)), 0), Encoded((11, 12), ((3, 1), (4, 1)), 1)]


@pytest.mark.parametrize(("family", "method"), GRID)
def test_identity_plug_changes_nothing(family: str, method: str) -> None:
    layout, module = _tuned(family, method)
    row = TABLE[method]
    eyes = {
        key: torch.eye(large, dtype=torch.float64).repeat(stacked, 1, 1)
        for key, (stacked, large, _) in plug_shapes(row, layout, layout, module).items()
    }
    assert uniform_layer_map(layout, layout) == {s: list(range(n)) for s, n in layout.layers.items()}
    carried = apply_plug(row, layout, layout, eyes, duplicate(module, uniform_layer_map(layout, layout)))
    assert carried.keys() == module.keys()
    assert all(torch.equal(carried[slot], module[slot]) for slot in module)


@pytest.mark.parametrize(("family", "method", "down"), pairwise(FAMILIES, METHODS, ("select", "learned")))
def test_identity_down_changes_nothing(family: str, method: str, down: str) -> None:
    model = make_model(family)
    layout, module = _tuned(family, method)
    plan = plan_bridge(layout, magnitude(model, layout), layout.sizes)
    row = TABLE[method]
    viewed = apply_down(row, layout, plan, start_down(down, layout, plan, row, module), module)
    assert all(torch.equal(viewed[slot], module[slot]) for slot in module)


@pytest.mark.parametrize(("family", "method"), GRID)
def test_learned_down_starts_as_the_selection(family: str, method: str) -> None:
    selected = coupling_of(family, method, "select")
    learned = coupling_of(family, method, "learned")
    a, b = selected.at_bridge_width(), learned.at_bridge_width()
    assert learned.down
    assert all(torch.equal(a[slot], b[slot]) for slot in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_lora_equals_composing_maps_and_module(family: str) -> None:
    """x -> P_out B A P_in^T x, composed step by step in float64, equals the folded tensors."""
    small, module = _tuned(family, "lora", hidden=8, layers=1, heads=2)
    large = layout_for(make_model(family, hidden=16, layers=3, heads=4))
    row = TABLE["lora"]
    wide = duplicate(module, uniform_layer_map(small, large))
    plug = random_plug(plug_shapes(row, small, large, wide), torch.Generator().manual_seed(1))
    plug = {key: maps.double() for key, maps in plug.items()}
    folded = unpack(row, large, fold(row, small, large, plug, wide, torch.float64))
    for slot, a in wide.items():
        if slot.tensor != "lora_A.weight":
            continue
        other = replace(slot, tensor="lora_B.weight")
        x = torch.randn(5, folded[slot].shape[1], dtype=torch.float64)
        y = x @ plug[plug_key(slot)][0] @ a.T @ wide[other].T
        maps = plug[plug_key(other)]
        y = torch.cat([part @ m.T for part, m in zip(y.chunk(len(maps), -1), maps, strict=True)], -1)
        assert torch.allclose(x @ folded[slot].T @ folded[other].T, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_adapters_equals_composing_maps_and_module(family: str) -> None:
    small, module = _tuned(family, "adapter", hidden=8, layers=1, heads=2)
    large = layout_for(make_model(family, hidden=16, layers=3, heads=4))
    row = TABLE["adapter"]
    wide = duplicate(module, uniform_layer_map(small, large))
    plug = random_plug(plug_shapes(row, small, large, wide), torch.Generator().manual_seed(1))
    plug = {key: maps.double() for key, maps in plug.items()}
    folded = unpack(row, large, fold(row, small, large, plug, wide, torch.float64))
    for slot in wide:
        if slot.tensor != "adapter_down.weight":
            continue
        names = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")
        down, down_bias, up, up_bias = (replace(slot, tensor=name) for name in names)
        y = torch.randn(5, 16, dtype=torch.float64)
        inner = torch.tanh(y @ plug[plug_key(down)][0] @ wide[down].T + wide[down_bias])
        composed = (inner @ wide[up].T + wide[up_bias]) @ plug[plug_key(up)][0].T
        ours = torch.tanh(y @ folded[down].T + folded[down_bias]) @ folded[up].T + folded[up_bias]
        assert torch.allclose(ours, composed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_prefixes_equals_mapping_every_key_and_value(family: str) -> None:
    small, module = _tuned(family, "prefix", hidden=8, layers=1, heads=2)
    large = layout_for(make_model(family, hidden=16, layers=3, heads=4))
    row = TABLE["prefix"]
    wide = duplicate(module, uniform_layer_map(small, large))
    plug = random_plug(plug_shapes(row, small, large, wide), torch.Generator().manual_seed(1))
    plug = {key: maps.double() for key, maps in plug.items()}
    folded = unpack(row, large, fold(row, small, large, plug, wide, torch.float64))
    (maps,) = plug.values()
    for slot, tensor in wide.items():
        composed = torch.einsum("tks,kls->tkl", tensor.reshape(2, 2, -1), maps).flatten(1)
        assert torch.allclose(folded[slot], composed, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "method"), GRID)
def test_folded_checkpoint_loads_with_peft_and_gives_our_logits(family: str, method: str, tmp_path: Path) -> None:
    coupling = coupling_of(family, method)
    row, large = coupling.method, coupling.large
    with torch.no_grad():
        state = fold(row, coupling.small, large, coupling.plug, coupling.module)
        composed = {key: tensor.detach() for key, tensor in pack(row, large, coupling.at_large_width()).items()}
    save(tmp_path, row.configure(large, row.roles, SETTINGS), state, None)
    base = make_model(family, hidden=16, layers=2, heads=4, seed=3).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    twin = make_model(family, hidden=16, layers=2, heads=4, seed=3).double()
    ours, _ = attach(twin, row, large, SETTINGS)
    load_state(ours, composed)
    plugged = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.allclose(logits_of(plugged.eval()), logits_of(ours.eval()), rtol=0, atol=1e-5)
    if method == "lora":
        merged = plugged.unload()
        assert all(torch.equal(merged.state_dict()[n], t) for n, t in before.items())


@pytest.mark.parametrize(("family", "method", "down"), pairwise(FAMILIES, METHODS, ("select", "learned")))
def test_standalone_trains_every_part(family: str, method: str, down: str) -> None:
    coupling = coupling_of(family, method, down)
    parameters = coupling.parameters()
    loss = MODES["standalone"].start(coupling)(ROWS)
    loss.backward()
    for part in ("module", "plug", "bridge", *(("down",) if down == "learned" else ())):
        gradients = [t.grad for n, t in parameters.items() if n.startswith(f"{part}/")]
        assert any(g is not None and float(g.abs().sum()) > 0 for g in gradients), part


@pytest.mark.parametrize(("family", "method", "train_bridge"), pairwise(FAMILIES, METHODS[:2], (True, False)))
def test_running_the_blocks_again_gives_the_same_gradients(family: str, method: str, train_bridge: bool) -> None:
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor], int]] = []
    for recompute in (True, False):
        coupling = replace(coupling_of(family, method), train_bridge=train_bridge, recompute=recompute)
        require_gradients(coupling)
        runs: list[object] = []
        stack = coupling.large.family.stack[coupling.large.family.prefix.stack]
        norm = coupling.bridge.get_submodule(f"{stack.path.format(1)}.{stack.sublayers[0].norm}")
        norm.register_forward_pre_hook(lambda module, _inputs, runs=runs: runs.append(module))
        parameters = coupling.parameters()
        compute = MODES["standalone"].start(coupling)
        torch.manual_seed(0)  # dropout is the same in both
        loss = compute(ROWS)
        (3 * loss).backward()
        gradients = {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}
        found.append((loss.detach(), gradients, len(runs)))
    (again, first, twice), (kept, second, once) = found
    assert (twice, once) == (2, 1)
    assert torch.allclose(again, kept, rtol=1e-6)
    assert first.keys() == second.keys() != set()
    for name, gradient in first.items():
        assert torch.allclose(gradient, second[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("family", "method"), GRID)
def test_standalone_loss_is_the_loss_of_the_bridge_with_the_folded_module(family: str, method: str) -> None:
    coupling = coupling_of(family, method)
    coupling.bridge.config.dropout_rate = 0.0
    state = bridge_state(coupling)
    bridge = prune_model(make_model(family, hidden=16, layers=2, heads=4, seed=3), coupling.large, coupling.plan, {})
    wrapped, _ = attach(bridge, coupling.method, coupling.bridge_layout(), SETTINGS)
    load_state(wrapped, state)
    from plugbridge.evaluate import mean_loss
    from plugbridge.tasks.encode import gold

    frozen = replace(coupling, train_bridge=False)
    found = MODES["standalone"].start(frozen)(ROWS)
    wanted = mean_loss(wrapped.eval(), gold(coupling.encoder, ROWS), coupling.encoder.kind)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_layers_are_duplicated_evenly_and_in_order() -> None:
    small = layout_for(make_model("gpt2", layers=2))
    for count, wanted in ((2, [0, 1]), (4, [0, 0, 1, 1]), (5, [0, 0, 0, 1, 1]), (1, [0])):
        large = layout_for(make_model("gpt2", layers=count))
        assert uniform_layer_map(small, large) == {"decoder": wanted}
    layout, module = _tuned("t5", "lora", layers=1)
    large = layout_for(make_model("t5", layers=3))
    copies = duplicate(module, uniform_layer_map(layout, large))
    assert len(copies) == 3 * len(module)
    assert {slot.layer for slot in copies} == {0, 1, 2}


def test_random_plug_keeps_lengths_and_depends_on_the_seed_only() -> None:
    shapes = {"wide": (3, 16, 8), "narrow": (1, 4, 8)}
    plug = random_plug(shapes, torch.Generator().manual_seed(4))
    again = random_plug(shapes, torch.Generator().manual_seed(4))
    assert all(torch.equal(plug[key], again[key]) for key in shapes)
    assert torch.allclose(plug["wide"].mT @ plug["wide"], torch.eye(8).expand(3, 8, 8), atol=1e-5)
    assert torch.allclose(plug["narrow"] @ plug["narrow"].mT, torch.eye(4).expand(1, 4, 4), atol=1e-5)


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="known: standalone, ladder, ladder_delta, feedback, identity"):
        find_mode("telepathy")
