"""Coupling the upper layers only: what trains trains as before, what does not is silent and gets no gradient."""

import re
from dataclasses import replace

import pytest
import torch
from test_transfer import ROWS, SETTINGS, coupling_of
from torch import Tensor

from conftest import FAMILIES, METHODS, logits_of, make_model, pairwise
from plugbridge.evaluate import mean_loss
from plugbridge.tasks.encode import gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, drop_vocabulary, require_gradients, silence
from plugbridge.tuners.module import Module, attach, load_state, pack, parameter_name

GRID = [(family, method) for family in FAMILIES if family != "t5-gated" for method in METHODS]


def double(family: str, method: str, reduction: float = 1, upper: bool = True) -> Coupling:
    """A coupling in float64 with its large model of two layers, of which only the upper one may train."""
    coupling = coupling_of(family, method, reduction=reduction)
    tensors = {
        part: {key: tensor.detach().double() for key, tensor in getattr(coupling, part).items()}
        for part in ("module", "plug", "down")
    }
    found = replace(
        coupling, **tensors, bridge=coupling.bridge.double(), large_model=large_model(family).double(),
        train_bridge=False, first=dict.fromkeys(coupling.large.layers, 1) if upper else {},
    )  # fmt: skip
    require_gradients(found)
    return found


def large_model(family: str):
    """The model that `coupling_of` prunes."""
    return make_model(family, hidden=16, layers=2, heads=4, seed=3)


def tolerance_of(family: str) -> float:
    """transformers computes RMSNorm's mean square and T5's attention softmax in float32."""
    return 1e-9 if family == "gpt2" else 2e-5


def _gradients(coupling: Coupling, loss: Tensor) -> dict[str, Tensor | None]:
    loss.backward()
    return {name: tensor.grad for name, tensor in coupling.parameters().items()}


def _is_lower(name: str) -> bool:
    return re.match(r"module/\w+:0:", name) is not None


def _near(found: Tensor | None, wanted: Tensor | None, tolerance: float) -> bool:
    assert found is not None
    assert wanted is not None
    scale = float(wanted.abs().max())
    return scale > 0 and float((found - wanted).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    ("method", "mode", "family"), pairwise(METHODS, ("standalone", "ladder", "feedback"), ("gpt2", "t5"))
)
def test_modules_of_lower_layers_get_no_gradient(family: str, method: str, mode: str) -> None:
    coupling = coupling_of(family, method)
    first = dict.fromkeys(coupling.large.layers, 1)
    coupling = replace(coupling, large_model=large_model(family), train_bridge=False, first=first)
    require_gradients(coupling)
    parameters = coupling.parameters()
    assert {name for name in parameters if not parameters[name].requires_grad} == set(filter(_is_lower, parameters))
    gradients = _gradients(coupling, MODES[mode].start(coupling)(ROWS))
    assert {name for name in gradients if gradients[name] is None} == set(filter(_is_lower, parameters))
    upper = [g for name, g in gradients.items() if name.startswith("module/") and g is not None]
    assert sum(float(g.abs().sum()) > 0 for g in upper) > len(upper) // 2


@pytest.mark.parametrize(("family", "method"), GRID)
def test_feedback_to_the_upper_layers_is_the_feedback_that_they_had(family: str, method: str) -> None:
    whole, upper = double(family, method, upper=False), double(family, method)
    losses = [MODES["feedback"].start(coupling)(ROWS) for coupling in (whole, upper)]
    assert torch.equal(*losses)
    wanted, found = (_gradients(c, loss) for c, loss in zip((whole, upper), losses, strict=True))
    for name, gradient in wanted.items():
        if _is_lower(name):
            assert gradient is not None, name
            assert found[name] is None, name
        elif name.startswith("module/"):
            assert _near(found[name], gradient, 1e-12), name


@pytest.mark.parametrize(("family", "method"), GRID)
def test_feedback_is_backpropagation_with_the_lower_modules_held_fast(family: str, method: str) -> None:
    coupling = double(family, method)
    wrapped, _ = attach(large_model(family).double(), coupling.method, coupling.large, SETTINGS)
    wide = coupling.at_large_width()
    held: Module = {slot: tensor if coupling.trains(slot) else tensor.detach() for slot, tensor in wide.items()}
    replaced = {parameter_name(key): tensor for key, tensor in pack(coupling.method, coupling.large, held).items()}

    def forward(**inputs):
        return torch.func.functional_call(wrapped.eval(), replaced, (), inputs)

    exact = mean_loss(forward, gold(coupling.encoder, ROWS), coupling.encoder.kind)
    trained = {name: tensor for name, tensor in coupling.parameters().items() if tensor.requires_grad}
    wanted = dict(zip(trained, torch.autograd.grad(exact, list(trained.values())), strict=True))
    found = _gradients(coupling, MODES["feedback"].start(coupling)(ROWS))
    assert {name for name in found if found[name] is not None} == set(wanted)
    assert any(name.startswith("plug/") for name in wanted)
    for name, gradient in wanted.items():
        assert _near(found[name], gradient, tolerance_of(family)), name


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_feedback_stops_below_the_first_module_that_trains(family: str, upper: bool) -> None:
    coupling = double(family, "lora", reduction=2, upper=upper)
    loss = MODES["feedback"].start(coupling)
    stack = coupling.large.family.stack["decoder"]
    ran: list[int] = []
    for layer in range(2):
        for sublayer in stack.sublayers:
            function = coupling.bridge.get_submodule(f"{stack.path.format(layer)}.{sublayer.function}")
            function.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    loss(ROWS)
    assert ran == ([1, 1] if upper else [1, 1, 0, 0])


@pytest.mark.parametrize(("family", "method"), GRID)
def test_silence_leaves_the_upper_layers_module_and_no_other(family: str, method: str) -> None:
    """A prefix cannot be silenced: there is none that changes nothing."""
    coupling = double(family, method)
    before = {slot: tensor.detach().clone() for slot, tensor in coupling.module.items()}
    silence(coupling)
    for slot, tensor in coupling.module.items():
        if method == "prefix" or slot.layer == 1:
            assert torch.equal(tensor, before[slot])
        else:
            assert not tensor.any()
    if method == "prefix":
        return
    layout, row = coupling.large, coupling.method
    wide = {slot: tensor.detach() for slot, tensor in coupling.at_large_width().items()}

    def logits(module: Module) -> Tensor:
        wrapped, _ = attach(large_model(family), row, layout, SETTINGS)
        load_state(wrapped, pack(row, layout, module))
        return logits_of(wrapped.eval())

    bare = logits_of(large_model(family))
    nothing = {slot: torch.zeros_like(tensor) for slot, tensor in wide.items()}
    assert torch.equal(logits({slot: t if slot.layer == 0 else nothing[slot] for slot, t in wide.items()}), bare)
    assert not torch.allclose(logits(wide), bare, atol=1e-3)
    with torch.no_grad():
        for slot, tensor in coupling.module.items():
            tensor.copy_(before[slot])
    loud = {slot: tensor.detach() for slot, tensor in coupling.at_large_width().items()}
    assert not torch.allclose(logits({s: t if s.layer == 0 else nothing[s] for s, t in loud.items()}), bare, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "mode", "method"),
    pairwise(("gpt2", "t5", "llama"), [name for name, mode in MODES.items() if not mode.reads_tokens], METHODS),
)
def test_where_the_bridge_reads_no_tokens_its_vocabulary_is_never_used(family: str, method: str, mode: str) -> None:
    found: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for dropped in (False, True):
        coupling = double(family, method, reduction=2)
        size = sum(p.numel() for p in coupling.bridge.parameters())
        if dropped:
            drop_vocabulary(coupling.bridge, coupling.large)
            assert sum(p.numel() for p in coupling.bridge.parameters()) < size
        loss = MODES[mode].start(coupling)(ROWS)
        found.append((loss.detach(), _gradients(coupling, loss)))
    (whole, gradients), (bare, same) = found
    assert torch.equal(whole, bare)
    for name, gradient in gradients.items():
        other = same[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name
