"""Fidelity: one where nothing is compressed, less where something is; a Bridge no better than none is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from test_backprop import assert_near, autograd, without_dropout
from test_through import _coupling
from test_transfer import ROWS, coupling_of

from conftest import FAMILIES, METHODS, pairwise
from plugbridge.config.stages import Activations
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, require_gradients
from plugbridge.transfer.fidelity import Fidelity, WaysBack, fidelity
from test_streaming import resident, streamed


def _measured(coupling: Coupling) -> Fidelity:
    ways = MODES["feedback"].start(coupling)
    assert isinstance(ways, WaysBack)
    return fidelity(coupling, ways, ROWS, 3, 2)


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


@pytest.mark.parametrize(("family", "method", "activations"), pairwise(FAMILIES, METHODS, ("bridge", "large")))
def test_the_exact_way_is_autograd_through_the_whole_model(family: str, method: str, activations: Activations) -> None:
    coupling = replace(_coupling(family, 2, method=method), activations=activations)
    ways = MODES["feedback"].start(coupling)
    assert isinstance(ways, WaysBack)
    ways.exact(ROWS).backward()
    found = {n: t.grad for n, t in coupling.parameters().items() if t.grad is not None}
    assert_near(found, autograd(without_dropout(_coupling(family, 2, method=method)), ROWS)[1], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_as_faithful(sharded: Callable[[str], Path], family: str) -> None:
    for activations in ("bridge", "large"):
        measured: list[Fidelity] = []
        for large in (resident(sharded(family)), streamed(sharded(family))[0]):
            coupling = coupling_of(family, "lora", large_model=resident(sharded(family)), reduction=2)
            ways = cast(Activations, activations)
            measured.append(_measured(replace(coupling, large_model=large, train_bridge=False, activations=ways)))
        for stack, cosines in measured[0].bridge.items():
            assert measured[1].bridge[stack] == pytest.approx(cosines, abs=1e-5)


def test_modules_of_negative_fidelity_stay_still_but_are_measured_again() -> None:
    coupling = replace(_coupling("t5", 2), activations="bridge")
    ways = MODES["feedback"].start(coupling)
    assert isinstance(ways, WaysBack)
    whole = fidelity(coupling, ways, ROWS, 0, 2)
    coupling.still.add(("encoder", 1))
    require_gradients(coupling)
    trained = [slot for slot, tensor in coupling.module.items() if tensor.requires_grad]
    assert {(slot.stack, slot.layer) for slot in trained} == {("decoder", 0), ("decoder", 1), ("encoder", 0)}
    before = torch.autograd.grad(ways(ROWS), [coupling.module[slot] for slot in trained])
    assert fidelity(coupling, ways, ROWS, 0, 2) == whole
    after = torch.autograd.grad(ways(ROWS), [coupling.module[slot] for slot in trained])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert coupling.still == {("encoder", 1)}


def test_what_is_wrong_is_told_by_layer_unless_all_is() -> None:
    found = Fidelity(0, {"decoder": [0.4, -0.1], "encoder": [0.0, 0.2]}, {})
    assert found.wrong({"decoder": 1}) == {("decoder", 2), ("encoder", 0)}
    assert Fidelity(0, {"decoder": [-0.4, -0.1]}, {}).wrong({}) == set()


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
    fidelity(coupling, ways, ROWS, 0, 1)
    after = torch.autograd.grad(ways(ROWS), list(coupling.module.values()))
    assert all(tensor.grad is None for tensor in coupling.module.values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.allclose(ways.exact(ROWS), ways.none(ROWS))


def test_a_bridge_no_better_than_none_is_said() -> None:
    bad, good = Fidelity(0, {"decoder": [0.1, 0.2]}, {"decoder": [0.5, 0.3]}), Fidelity(0, {"d": [0.9]}, {"d": [0.5]})
    assert "no better than without one (cosines with the exact gradient: 0.15 and 0.40)" in str(bad.advice())
    assert good.advice() is None
    assert good.said() == "fidelity 0.90 (no Bridge: 0.50)"
