"""The error sent back through the Bridge's matrices alone: packed or pruned, at all positions or some."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from test_transfer import ROWS, coupling_of
from torch import nn
from transformers import PreTrainedModel

from conftest import FAMILIES, make_model, pack_model
from plugbridge.shrink.packing import PackedLinear, matrices_of
from plugbridge.tensors.axes import matrix_of
from plugbridge.tensors.patterns import axis_names
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.through import Back, back_of, carrying, weight_of


def _coupling(family: str, reduction: float, bits: int = 16, method: str = "lora") -> Coupling:
    coupling = coupling_of(family, method, reduction=reduction)
    if bits != 16:
        pack_model(coupling.bridge, coupling.large, bits)  # pyright: ignore[reportArgumentType]
    large = make_model(family, hidden=16, layers=2, heads=4, seed=3)
    return replace(coupling, large_model=large, train_bridge=False, activations="large")


def _gradient(coupling: Coupling) -> dict[str, torch.Tensor]:
    parameters = coupling.parameters()
    found = torch.autograd.grad(MODES["feedback"].start(coupling)(ROWS), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [16, 3])
def test_every_matrix_sends_errors_back_as_the_formula_says(family: str, bits: int) -> None:
    coupling = _coupling(family, 2, bits)
    layout, large = coupling.large, cast(PreTrainedModel, coupling.large_model)
    seen: set[str] = set()
    for path in matrices_of(large, layout):
        layer, place = coupling.bridge.get_submodule(path), layout.place_of(path)[0]
        weight = large.get_submodule(path).get_parameter("weight")
        pattern = layout.table()[f"{path}.weight"].pattern
        names = axis_names(pattern)
        wide = weight.detach().reshape([layout.sizes[name] for name in names])
        for position, axis in enumerate(names):  # W~ at the large width: zeros where the Bridge has nothing
            op = coupling.plan.ops(layout, axis, place).get(axis)
            if op is not None:
                kept = matrix_of(op, layout.sizes[axis])
                wide = torch.tensordot(wide, kept.mT @ kept, dims=([position], [0])).movedim(-1, position)
        matrix = wide.reshape(weight.shape)
        lifted = matrix.mT if layout.family.linear == "out in" else matrix  # (in, out)
        error = torch.randn(2, 3, lifted.shape[1], generator=torch.Generator().manual_seed(1))
        found = back_of(coupling, path, layer).send(error)
        if bits == 16:
            assert torch.allclose(found, error @ lifted.mT, atol=1e-5), path
        else:
            assert isinstance(layer, PackedLinear)
            kept_out = (error @ lifted.mT).abs() > 0
            assert not bool((found.abs() > 0)[~kept_out & (lifted.abs().sum(1) == 0)].any()), path
        seen.add(path.rpartition(".")[2])
    assert len(seen) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_bridge_is_its_unpacked_self(family: str) -> None:
    packed = _coupling(family, 1, 2)
    plain = _coupling(family, 1)
    for path in matrices_of(plain.bridge, plain.large):
        layer = plain.bridge.get_submodule(path)
        matrix = weight_of(packed.bridge.get_submodule(path), torch.float32)
        layer.get_parameter("weight").data.copy_(matrix if plain.large.family.linear == "in out" else matrix.mT)
    found, wanted, exact = _gradient(packed), _gradient(plain), _gradient(_coupling(family, 1))
    assert any(not torch.allclose(exact[name], wanted[name], rtol=1e-2) for name in wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_positions_without_an_error_are_left_out_and_change_nothing() -> None:
    matrix = torch.randn(6, 5)
    asked: list[torch.dtype] = []

    def weight(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return matrix

    error = torch.randn(4, 7, 5)
    error[:, :5] = 0
    assert torch.equal(carrying(error.view(-1, 5), 0.0), (error.abs().sum(-1).view(-1) > 0).nonzero().squeeze(1))
    assert torch.allclose(Back(weight, None, None, 6).send(error), error @ matrix.mT, atol=1e-6)
    assert carrying(torch.randn(3, 5), 0.0) is None
    assert torch.equal(Back(weight, None, None, 6).send(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 6))
    assert asked == [torch.float32] * 2


@pytest.mark.parametrize("bound", [0.01, 0.2, 0.9])
def test_dropped_positions_carry_no_more_than_the_bound(bound: float) -> None:
    rows = torch.randn(50, 8) * torch.rand(50, 1).pow(4)
    kept = carrying(rows, bound)
    assert kept is not None
    share = rows[kept].square().sum() / rows.square().sum()
    assert share >= 1 - bound
    smallest = rows[kept].square().sum(1).min()
    assert share - smallest / rows.square().sum() < 1 - bound  # one less would be too few
    left = torch.ones(50, dtype=torch.bool).index_fill(0, kept, False)
    assert rows[left].square().sum(1).max() <= smallest


def test_a_bound_leaves_positions_behind_and_keeps_the_direction() -> None:
    exact, some = _gradient(_coupling("gpt2", 1)), _gradient(replace(_coupling("gpt2", 1), error_bound=0.02))
    pair = [torch.cat([tensor.flatten() for tensor in found.values()]) for found in (exact, some)]
    assert not torch.equal(*pair)
    assert torch.cosine_similarity(*pair, dim=0) > 0.97


def test_the_large_model_is_only_run_forward() -> None:
    """Its layers may be of any kind: here they fail as soon as they are differentiated."""
    coupling = _coupling("gpt2", 1, 4)
    large = cast(PreTrainedModel, coupling.large_model)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            return layer(x)

        @staticmethod
        def backward(ctx, *errors):
            raise AssertionError("differentiated")

    for path in matrices_of(large, coupling.large):
        layer: nn.Module = large.get_submodule(path)
        own = layer.forward
        layer.forward = lambda x, own=own: Opaque.apply(x, own) if x.requires_grad else own(x)
    assert all(bool(gradient.isfinite().all()) for gradient in _gradient(coupling).values())
