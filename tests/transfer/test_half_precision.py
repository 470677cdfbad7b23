"""A large model in bfloat16: what trains stays float32, and learns in the direction it would without."""

from dataclasses import replace

import pytest
import torch
from test_coupling import large_model
from test_transfer import ROWS, coupling_of
from torch import Tensor

from conftest import FAMILIES, METHODS, pairwise
from plugbridge.tasks.encode import Encoded
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.repair import repair_loss, repaired_parameters

READS_LARGE = ("feedback", "identity", "ladder", "ladder_delta")
"""Modes that run the large model."""


def _coupling(family: str, method: str, dtype: torch.dtype) -> Coupling:
    return replace(coupling_of(family, method), large_model=large_model(family).to(dtype), train_bridge=False)


def gradient_of(coupling: Coupling, mode: str) -> tuple[float, dict[str, Tensor]]:
    """A batch's loss, and its gradient by the name of what trains."""
    loss = MODES[mode].start(coupling)(ROWS)
    loss.backward()
    found = {name: t.grad for name, t in coupling.parameters().items() if t.grad is not None}
    return float(loss.detach()), found


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The cosine between two gradients, all their tensors as one vector."""
    assert a.keys() == b.keys()
    flat = [torch.cat([part[name].flatten().double() for name in a]) for part in (a, b)]
    return float(torch.cosine_similarity(flat[0], flat[1], 0))


@pytest.mark.parametrize(("family", "mode", "method"), pairwise(FAMILIES, READS_LARGE, METHODS))
def test_a_bfloat16_large_model_gives_the_float32_direction(family: str, method: str, mode: str) -> None:
    exact, wanted = gradient_of(_coupling(family, method, torch.float32), mode)
    coupling = _coupling(family, method, torch.bfloat16)
    loss, found = gradient_of(coupling, mode)
    assert loss == pytest.approx(exact, rel=0.02)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert {t.dtype for t in (*coupling.parameters().values(), *found.values())} == {torch.float32}
    assert coupling.large_model is not None
    assert coupling.large_model.dtype == torch.bfloat16
    assert cosine(found, wanted) > 0.995


@pytest.mark.parametrize("mode", ["feedback", "ladder_delta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_norm_weights_of_zero_change_no_direction(family: str, mode: str) -> None:
    """An unpruned Bridge in float32 and the large model in bfloat16, some of both's norm weights 0 or nearly."""
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        large, coupling = large_model(family), coupling_of(family, "lora", reduction=1)
        for model in (large, coupling.bridge):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1 and name.endswith("weight"):
                        parameter[[1, 6, 15]] = torch.tensor([0.0, 0.0, 1e-30])
        found.append(gradient_of(replace(coupling, large_model=large.to(dtype), train_bridge=False), mode)[1])
    assert cosine(*found) > 0.995


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_is_repaired_in_float32_by_a_bfloat16_large_model(family: str) -> None:
    rows = [Encoded((*range(3 + i, 9 + 2 * i), 1), ((3, 1), (4, 1)), 0) for i in range(10)]  # a few would round apart
    gradients: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        coupling = coupling_of(family, "lora")
        torch.manual_seed(0)
        bridge, large = coupling.bridge, large_model(family).to(dtype)
        repair_loss("response", large, coupling.large, bridge, coupling.plan, coupling.encoder)(rows).backward()
        parameters = repaired_parameters(bridge, coupling.large, "response")
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert {gradient.dtype for gradient in gradients[1].values()} == {torch.float32}
    assert cosine(*gradients) > 0.95  # the response to a small push is a difference of rounded numbers
