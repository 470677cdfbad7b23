"""The gradient on its way down the residual stream, against dense Jacobians."""

from dataclasses import replace

import pytest
import torch
from test_transfer import coupling_of

from plugbridge.transfer.residual import Width
from plugbridge.transfer.residual_gradient import NarrowNorm, ResidualGradient

HIDDEN = 16


def _norm(family: str, without_weight: int) -> torch.nn.Module:
    """A norm with random weights, one of them 0 and one as good as 0."""
    norm = (torch.nn.LayerNorm if family == "gpt2" else torch.nn.RMSNorm)(HIDDEN, eps=1e-5).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        norm.weight[without_weight] = 0
        norm.weight[-1] = 1e-12
    return norm


@pytest.mark.parametrize(("rows", "keep"), [(3, False), (3, True), (1, False)])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_norm_is_passed_by_its_jacobian_in_the_bridges_channels(
    family: str, projected: bool, rows: int, keep: bool
) -> None:
    torch.manual_seed(0)
    coupling = coupling_of(family, "lora", reduction=2)
    kept = coupling.plan.sizes["hidden"]
    matrix = torch.eye(HIDDEN, dtype=torch.float64)[coupling.plan.keep["hidden"]]
    if projected:
        matrix = torch.linalg.qr(torch.randn(HIDDEN, kept, dtype=torch.float64)).Q.T
        coupling = replace(coupling, plan=replace(coupling.plan, basis={"hidden": matrix}))
    norm = _norm(family, int(coupling.plan.keep["hidden"][0]))
    h, error, end = (torch.randn(rows, 5, n, dtype=torch.float64) for n in (HIDDEN, kept, HIDDEN))
    x = norm(h).detach()
    centred = h - h.mean(-1, keepdim=True) if family == "gpt2" else h
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    unit = centred * inverse
    width = Width(coupling.large, coupling.plan)
    narrow = NarrowNorm(width, norm, torch.float64, keep)
    assert narrow._many(error) == (rows == 3)  # either way is tried
    gradient, before = ResidualGradient(width, end), end.clone()
    assert gradient.wide() is end
    for _ in range(2):  # what is added is added up
        gradient.add(*narrow.backward(x @ matrix.T, unit @ matrix.T, inverse, error))
    weighted = norm.weight.detach() * (error @ matrix)
    change = weighted - unit * (unit * weighted).sum(-1, keepdim=True) / HIDDEN
    change = change @ matrix.T @ matrix  # what the Bridge has no direction for is not kept
    if family == "gpt2":
        change = change - weighted.mean(-1, keepdim=True)
    wanted = end + 2 * inverse * change
    assert torch.allclose(gradient.wide(), wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient.low(), wanted @ matrix.T, rtol=1e-10, atol=1e-12)
    assert torch.equal(end, before)
