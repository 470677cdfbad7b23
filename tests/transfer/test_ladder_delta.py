"""The ladder of changes: with an unpruned Bridge backpropagation, without a module the large model itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_coupling import double, large_model, tolerance_of
from test_feedback import _rotated
from test_ladder import BATCHES, A, B, C, Trained
from test_transfer import SETTINGS
from torch import Tensor

from conftest import FAMILIES, METHODS, logits_of, pairwise, token_inputs
from plugbridge.evaluate import mean_loss
from plugbridge.tasks.encode import gold
from plugbridge.transfer.cache import make_cache
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.ladder import norm_rungs, replaced_norms
from plugbridge.tuners.module import attach, pack, parameter_name

GRID = [(family, method) for family in FAMILIES for method in METHODS]


def _near(found: Tensor, wanted: Tensor, family: str) -> bool:
    return float((found - wanted).abs().max()) <= tolerance_of(family) * float(wanted.abs().max())


# norms


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_a_rung_at_every_norm_once(family: str) -> None:
    layout = double(family, "lora").large
    rungs = norm_rungs(layout)
    assert sorted(rungs.values()) == sorted(layout.norms())
    for stack, count in layout.layers.items():
        per_layer = len(layout.family.stack[stack].sublayers)
        assert sum(rung.startswith(f"{stack}:") for rung in rungs) == per_layer * count + 1
        assert rungs[f"{stack}:end"] == layout.family.stack[stack].final_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_norms_give_what_they_are_told_and_only_while_the_block_runs(family: str) -> None:
    model = large_model(family)
    rungs = norm_rungs(double(family, "lora").large)
    bare, read = logits_of(model), []

    def doubled(rung: str, stream: Tensor) -> Tensor:
        read.append(rung)
        return 2 * stream

    with replaced_norms(model, rungs, doubled):
        changed = logits_of(model)
    assert read == list(rungs)  # every norm, in the order in which they run
    assert torch.equal(logits_of(model), bare)
    assert not torch.allclose(changed, bare, atol=1e-2)
    with torch.no_grad(), replaced_norms(model, {"end": rungs["decoder:end"]}, lambda _, stream: 0 * stream):
        assert not model(**token_inputs(model)).logits.any()  # the head has no bias
    assert all(not module._forward_hooks for module in model.modules())


# the loss


@pytest.mark.parametrize(("family", "method", "rotated"), pairwise(FAMILIES, METHODS, (False, True)))
def test_an_unpruned_bridge_makes_it_backpropagation(family: str, method: str, rotated: bool) -> None:
    coupling = double(family, method, upper=False)
    if rotated:
        coupling = _rotated(coupling)
    wrapped, _ = attach(large_model(family).double(), coupling.method, coupling.large, SETTINGS)
    state = pack(coupling.method, coupling.large, coupling.at_large_width())
    replaced = {parameter_name(key): tensor for key, tensor in state.items()}

    def forward(**inputs):
        return torch.func.functional_call(wrapped.eval(), replaced, (), inputs)

    rows = [A, B, C]
    exact = mean_loss(forward, gold(coupling.encoder, rows), coupling.encoder.kind)
    parameters = coupling.parameters()
    wanted = dict(zip(parameters, torch.autograd.grad(exact, list(parameters.values())), strict=True))
    loss, found = Trained(coupling, "ladder_delta")(rows)
    assert torch.allclose(loss, exact, rtol=tolerance_of(family))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert _near(found[name], gradient, family), name


@pytest.mark.parametrize(("family", "method", "projected"), pairwise(FAMILIES, ("lora", "adapter"), (False, True)))
def test_a_module_that_does_nothing_leaves_the_large_models_loss(family: str, method: str, projected: bool) -> None:
    """Whatever the Bridge is: it carries only what the module changes."""
    coupling = double(family, method, reduction=2, upper=False)
    if projected:
        width = coupling.plan.sizes["hidden"]
        noise = torch.randn(16, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        plan = replace(coupling.plan, basis={"hidden": torch.linalg.qr(noise).Q.mT.contiguous()})
        coupling = replace(coupling, plan=plan)
    rows = [A, B, C]
    exact = mean_loss(large_model(family).double(), gold(coupling.encoder, rows), coupling.encoder.kind)
    step = Trained(coupling, "ladder_delta")
    assert not torch.allclose(step(rows)[0], exact, rtol=1e-3)
    with torch.no_grad():
        for slot, tensor in coupling.module.items():
            if slot.tensor.startswith(("lora_B", "adapter_up")):
                tensor.zero_()
    assert torch.allclose(step(rows)[0], exact, rtol=1e-12)


@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_cache_changes_neither_loss_nor_gradients(family: str, method: str, tmp_path: Path) -> None:
    couplings = (double(family, method, reduction=2, upper=False) for _ in range(2))
    plain, cached = (
        Trained(replace(coupling, cache=make_cache(kind, tmp_path)), "ladder_delta")
        for coupling, kind in zip(couplings, ("off", "memory"), strict=True)
    )
    for rows in BATCHES[:2]:
        value, wanted = plain(rows)
        loss, gradients = cached(rows)
        assert torch.allclose(loss, value, rtol=tolerance_of(family))
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.any(), name
            assert _near(gradients[name], gradient, family), name


@pytest.mark.parametrize(("family", "method"), GRID)
def test_only_module_and_plug_train(family: str, method: str) -> None:
    coupling = double(family, method, reduction=2, upper=False)
    large = coupling.large_model
    assert large is not None
    for model in (large, coupling.bridge):
        model.requires_grad_(True).train()  # come ready to train
    weights = {f"{i} {n}": p for i, m in enumerate((large, coupling.bridge)) for n, p in m.named_parameters()}
    loss = MODES["ladder_delta"].start(coupling)
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    first = loss([A, B, C])
    first.backward()
    assert torch.equal(loss([A, B, C]), first)  # no dropout
    assert not any(module.training for model in (large, coupling.bridge) for module in model.modules())
    for name, parameter in weights.items():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    assert {name.partition("/")[0] for name in coupling.parameters()} == {"module", "plug"}
    for name, tensor in coupling.parameters().items():
        assert tensor.grad is not None, name
        assert tensor.grad.any(), name
    for model in (large, coupling.bridge):
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
