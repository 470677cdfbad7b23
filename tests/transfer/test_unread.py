"""The last product of a function that is only differentiated is spared."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from plugbridge.transfer.unread import unread


def _layer(kind: type[torch.nn.Module]) -> torch.nn.Module:
    layer = torch.nn.Linear(6, 4) if kind is torch.nn.Linear else Conv1D(4, 6)
    return layer.double().requires_grad_(False)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_the_gradient_is_the_layers_and_its_product_is_not_made(kind: type[torch.nn.Module]) -> None:
    layer, x = _layer(kind), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    error = torch.randn(2, 3, 4, dtype=torch.float64)
    true = layer(x)
    (wanted,) = torch.autograd.grad(true, x, error)
    with unread(layer), FlopCounterMode(display=False) as counted:
        output = layer(x)
    assert counted.get_total_flops() == 0
    assert output.shape == true.shape
    (found,) = torch.autograd.grad(output, x, error)
    assert torch.allclose(found, wanted, rtol=1e-12)
    assert torch.equal(layer(x), true)


def test_the_layer_is_itself_again_after_an_error() -> None:
    layer, x = _layer(torch.nn.Linear), torch.ones(1, 6, dtype=torch.float64)
    true = layer(x)
    with pytest.raises(RuntimeError), unread(layer):
        layer(torch.ones(1, 5, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert torch.equal(layer(x), true)


def test_hooks_that_bring_the_weight_still_run() -> None:
    layer, x, seen = _layer(Conv1D), torch.ones(1, 6, dtype=torch.float64, requires_grad=True), []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    with unread(layer):
        layer(x)
    assert seen == ["before", "after"]


def test_a_layer_that_something_wraps_gives_its_value() -> None:
    class Wrapped(torch.nn.Linear):
        """Any other class than the two plain ones."""

    layer, x = Wrapped(6, 4), torch.randn(3, 6)
    true = layer(x)
    with unread(layer):
        assert torch.equal(layer(x), true)
