"""Fidelity: one where nothing is compressed, less where something is; a Bridge no better than none is said."""

from dataclasses import replace

import pytest
import torch
from test_through import _coupling
from test_transfer import ROWS

from conftest import FAMILIES
from plugbridge.config.stages import Activations
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.fidelity import Fidelity, WaysBack, fidelity


def _measured(coupling: Coupling) -> Fidelity:
    ways = MODES["feedback"].start(coupling)
    assert isinstance(ways, WaysBack)
    return fidelity(coupling, ways, ROWS, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activations", ["bridge", "large"])
def test_an_unpruned_bridge_is_exact_and_a_narrow_one_is_not(family: str, activations: Activations) -> None:
    whole = _measured(replace(_coupling(family, 1), activations=activations))
    assert whole.step == 3
    layers = [value for stack in whole.bridge.values() for value in stack]
    assert len(layers) == sum(_coupling(family, 1).large.layers.values())
    assert min(layers) > 1 - 1e-5
    narrow = _measured(replace(_coupling(family, 2), activations=activations))
    assert -1 <= narrow.means()[0] < 0.999
    assert narrow.none.keys() == narrow.bridge.keys()
    assert narrow.none["decoder"] == pytest.approx(whole.none["decoder"], abs=1e-4)  # which no Bridge is in
    assert whole.means()[1] < 0.999
    if activations == "large":  # no Bridge is mode identity, whichever way is measured
        other = _measured(replace(_coupling(family, 1), activations="bridge"))
        for stack, layers in other.none.items():
            assert whole.none[stack] == pytest.approx(layers, abs=1e-4)


def test_more_bits_are_more_faithful() -> None:
    found = [_measured(_coupling("gpt2", 1, bits)).means()[0] for bits in (8, 4, 2)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99


def test_layers_that_do_not_train_are_left_out() -> None:
    coupling = replace(_coupling("gpt2", 1), first={"decoder": 1})
    for slot, tensor in coupling.module.items():
        tensor.requires_grad_(coupling.trains(slot))
    assert len(_measured(coupling).bridge["decoder"]) == 1


def test_it_leaves_no_gradient_and_changes_no_loss() -> None:
    coupling = _coupling("gpt2", 2)
    ways = MODES["feedback"].start(coupling)
    assert isinstance(ways, WaysBack)
    before = torch.autograd.grad(ways(ROWS), list(coupling.module.values()))
    fidelity(coupling, ways, ROWS, 0)
    after = torch.autograd.grad(ways(ROWS), list(coupling.module.values()))
    assert all(tensor.grad is None for tensor in coupling.module.values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.allclose(ways.exact(ROWS), ways.none(ROWS))


def test_a_bridge_no_better_than_none_is_said() -> None:
    bad, good = Fidelity(0, {"decoder": [0.1, 0.2]}, {"decoder": [0.5, 0.3]}), Fidelity(0, {"d": [0.9]}, {"d": [0.5]})
    assert "no better than without one (cosines with the exact gradient: 0.15 and 0.40)" in str(bad.advice())
    assert good.advice() is None
    assert good.said() == "fidelity 0.90 (no Bridge: 0.50)"
