"""Repair: nothing to mend at r = 1, something to mend below it, and only the Bridge is mended."""

from dataclasses import replace

import pytest
import torch
from test_coupling import large_model
from test_transfer import ROWS, coupling_of

from conftest import FAMILIES
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.prune import BridgePlan
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.repair import RepairTarget, repair_loss, repaired_parameters

TARGETS: tuple[RepairTarget, ...] = ("response", "logits")


def loss_of(coupling: Coupling, family: str, target: RepairTarget):
    large = large_model(family).to(next(coupling.bridge.parameters()).dtype)
    return repair_loss(target, large, coupling.large, coupling.bridge, coupling.plan, coupling.encoder)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unpruned_bridge_has_nothing_to_repair(family: str, target: RepairTarget) -> None:
    coupling = coupling_of(family, "lora", reduction=1)
    coupling.bridge.double()
    torch.manual_seed(0)
    assert float(loss_of(coupling, family, target)(ROWS).detach()) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_unpruned_bridge_answers_like_the_large_model(family: str) -> None:
    coupling = coupling_of(family, "lora", reduction=1)
    large = large_model(family).double()
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    plan = BridgePlan(coupling.plan.sizes, coupling.plan.keep, {"hidden": basis})
    turned = replace(coupling, plan=plan, bridge=prune_model(large, coupling.large, plan, {}))
    torch.manual_seed(0)
    assert float(loss_of(turned, family, "response")(ROWS).detach()) < 1e-8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_repair_brings_the_bridge_nearer(family: str, target: RepairTarget) -> None:
    coupling = coupling_of(family, "lora", reduction=2)
    loss = loss_of(coupling, family, target)
    parameters = repaired_parameters(coupling.bridge, coupling.bridge_layout(), target)
    assert parameters
    fixed = {n: p.detach().clone() for n, p in coupling.bridge.named_parameters() if n not in parameters}
    optimiser = torch.optim.Adam(parameters.values(), lr=1e-2)
    losses: list[float] = []
    for _ in range(40):
        torch.manual_seed(0)
        value = loss(ROWS)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.7 * losses[0]
    named = dict(coupling.bridge.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in fixed.items())
    if target == "response":  # norms and embeddings stay
        assert fixed
        assert not any("norm" in name or ".ln_" in name for name in parameters)


@pytest.mark.parametrize("target", TARGETS)
def test_the_large_model_gets_no_gradient(target: RepairTarget) -> None:
    coupling = coupling_of("t5", "lora", reduction=2)
    large = large_model("t5")
    loss = repair_loss(target, large, coupling.large, coupling.bridge, coupling.plan, coupling.encoder)(ROWS)
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in large.parameters())
    assert any(p.grad is not None for p in coupling.bridge.parameters())
