"""The control without a Bridge: the error at a stack's end goes to every layer as it is."""

from contextlib import ExitStack

import pytest
import torch
from test_coupling import double, large_model, tolerance_of
from test_transfer import ROWS, SETTINGS
from torch import Tensor

from conftest import FAMILIES, METHODS
from plugbridge.evaluate import mean_loss
from plugbridge.tasks.encode import gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.tuners.module import attach, pack, parameter_name

GRID = [(family, method) for family in FAMILIES for method in METHODS]


def _step(coupling: Coupling, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A step's loss and the gradients of what trains."""
    loss = MODES[mode].start(coupling)(ROWS)
    trained = {name: tensor for name, tensor in coupling.parameters().items() if tensor.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@torch.no_grad()
def _without_blocks(coupling: Coupling) -> Coupling:
    """The coupling with a Bridge that has nothing between its embeddings and its head."""
    table = coupling.large.table()
    for name, parameter in coupling.bridge.named_parameters():
        if table[name].place.stack is not None:
            parameter.zero_()
    return coupling


@pytest.mark.parametrize(("family", "method"), GRID)
def test_it_is_feedback_through_a_bridge_of_zeros(family: str, method: str) -> None:
    value, found = _step(double(family, method, reduction=2, upper=False), "identity")
    exact, wanted = _step(_without_blocks(double(family, method, reduction=2, upper=False)), "feedback")
    assert torch.equal(value, exact)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-12 * float(gradient.abs().max()), name
        assert bool(gradient.any()) == ("encoder:" not in name), name  # T5's is reached through sublayers only


@pytest.mark.parametrize(("family", "method"), GRID)
def test_it_is_backpropagation_with_every_sublayers_input_held_fast(family: str, method: str) -> None:
    """A reference of its own: autograd on the plugged large model, cut where sublayers read the stream."""
    coupling = double(family, method, reduction=2, upper=False)
    twin, layout = large_model(family).double(), coupling.large
    reader = layout.family.stack[layout.family.prefix.stack].final_norm
    norms = [twin.get_submodule(path) for path in layout.norms() if path != reader]
    wrapped, _ = attach(twin, coupling.method, layout, SETTINGS)
    state = pack(coupling.method, layout, coupling.at_large_width())
    replaced = {parameter_name(key): tensor for key, tensor in state.items()}

    def forward(**inputs):
        return torch.func.functional_call(wrapped.eval(), replaced, (), inputs)

    with ExitStack() as hooks:
        for norm in norms:
            handle = norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
            hooks.callback(handle.remove)
        exact = mean_loss(forward, gold(coupling.encoder, ROWS), coupling.encoder.kind)
    trained = coupling.parameters()
    wanted = dict(zip(trained, torch.autograd.grad(exact, list(trained.values()), allow_unused=True), strict=True))
    value, found = _step(coupling, "identity")
    assert torch.allclose(value, exact, rtol=tolerance_of(family))
    for name, gradient in found.items():
        exactly = wanted[name]
        if exactly is None:
            assert not gradient.any(), name
        else:
            scale = float(exactly.abs().max())
            assert scale > 0, name
            assert float((gradient - exactly).abs().max()) <= tolerance_of(family) * scale, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_to_the_upper_layers_it_is_what_they_had(family: str, method: str) -> None:
    _, whole = _step(double(family, method, reduction=2, upper=False), "identity")
    _, found = _step(double(family, method, reduction=2), "identity")
    assert {name for name in found if name.startswith("module/")} == {
        name for name in whole if name.startswith("module/") and ":1:" in name
    }
    for name, gradient in found.items():
        if name.startswith("module/"):
            assert torch.allclose(gradient, whole[name], rtol=1e-12, atol=0), name
