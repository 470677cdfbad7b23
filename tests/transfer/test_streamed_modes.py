"""Coupling and repair with a streamed large model: the same numbers as with the whole model in memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_half_precision import READS_LARGE, gradient_of
from test_transfer import ROWS, coupling_of
from torch import Tensor

from conftest import FAMILIES, METHODS, make_model, make_tokenizer, pack_model, pairwise
from plugbridge.config.stages import Activations
from plugbridge.shrink.packing import load_bridge
from plugbridge.streaming import Absent, window_of
from plugbridge.tensors.packed import Bits
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, drop_vocabulary
from plugbridge.transfer.repair import RepairTarget, repair_loss, repaired_parameters
from test_streaming import LAYERS, resident, streamed


def _pair(folder: Path, family: str, method: str) -> list[Coupling]:
    """The same coupling with the large model in memory and on disk."""
    plain = resident(folder)
    return [
        replace(coupling_of(family, method, large_model=plain), large_model=large, train_bridge=False)
        for large in (resident(folder), streamed(folder)[0])
    ]


@pytest.mark.parametrize(("family", "mode", "method"), pairwise(FAMILIES, READS_LARGE, METHODS))
def test_coupling_takes_the_same_step(sharded: Callable[[str], Path], family: str, method: str, mode: str) -> None:
    (exact, wanted), (loss, found) = (gradient_of(c, mode) for c in _pair(sharded(family), family, method))
    assert loss == exact
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_what_comes_next_is_learned_from_the_first_step(sharded: Callable[[str], Path]) -> None:
    """Feedback goes up and down again: 2 blocks are shared by consecutive ways, no block is read for nothing."""
    coupling = _pair(sharded("t5"), "t5", "lora")[1]
    window = window_of(coupling.large_model)
    assert window is not None
    loss = MODES["feedback"].start(coupling)
    loss(ROWS)
    loss(ROWS)
    reads = []
    for _ in range(3):
        before = window.reads
        loss(ROWS)
        reads.append(window.reads - before)
    assert reads == [2 * (2 * LAYERS) - 2] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_through_packed_matrices_read_no_block_again(sharded: Callable[[str], Path], family: str) -> None:
    """The large model's own blocks are gone when the error comes back through the Bridge's matrices."""
    found: list[tuple[float, dict[str, Tensor]]] = []
    for coupling in _pair(sharded(family), family, "lora"):
        pack_model(coupling.bridge, coupling.large, 4)
        found.append(gradient_of(replace(coupling, activations="large"), "feedback"))
        window = window_of(coupling.large_model)
    (exact, wanted), (loss, gradients) = found
    assert loss == exact
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())
    assert window is not None
    stacks = len(coupling.large.layers)
    assert window.reads == stacks * LAYERS + 1  # each once, and one read ahead


@pytest.mark.parametrize(
    ("family", "method", "how"),
    pairwise(FAMILIES, METHODS, (("bridge", 3), ("large", 16), ("large", 3))),
)
def test_a_streamed_bridge_takes_the_same_step(
    tmp_path: Path, family: str, method: str, how: tuple[Activations, Bits | Literal[16]]
) -> None:
    activations, bits = how
    plain = coupling_of(family, method)
    if bits != 16:
        pack_model(plain.bridge, plain.large, bits)
    plain.bridge.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found: list[list[Tensor]] = []
    for streams in (False, True):
        bridge = load_bridge(tmp_path, streamed=streams)
        drop_vocabulary(bridge, plain.large)
        absent = [(m, leaf) for m in bridge.modules() for leaf, p in m._parameters.items() if isinstance(p, Absent)]
        coupling = replace(
            coupling_of(family, method), bridge=bridge, train_bridge=False, activations=activations,
            large_model=make_model(family, hidden=16, layers=2, heads=4, seed=3),
        )  # fmt: skip
        loss = MODES["feedback"].start(coupling)
        before = 0
        for _ in range(3):  # the window learns in the first ones what comes next
            before = window.reads if (window := window_of(bridge)) is not None else 0
            found.append([*torch.autograd.grad(loss(ROWS), list(coupling.parameters().values()), allow_unused=True)])
        if window is not None:
            assert 0 < window.reads - before <= sum(plain.large.layers.values())  # each once a step
            there = [getattr(module, leaf) for module, leaf in absent]
            assert 0 < sum(not isinstance(p, Absent) for p in there) <= len(there) / len(window.blocks) * 2
    for gradients in found[1:]:
        for one, other in zip(found[0], gradients, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("target", ["response", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_repair_takes_the_same_step(sharded: Callable[[str], Path], family: str, target: RepairTarget) -> None:
    found: list[dict[str, Tensor]] = []
    for coupling in _pair(sharded(family), family, "lora"):
        torch.manual_seed(0)
        large, bridge = coupling.large_model, coupling.bridge
        assert large is not None
        repair_loss(target, large, coupling.large, bridge, coupling.plan, coupling.encoder)(ROWS).backward()
        parameters = repaired_parameters(bridge, coupling.large, target)
        found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
