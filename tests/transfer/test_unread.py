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


def test_a_weight_that_comes_when_the_layers_function_begins_is_read_then() -> None:
    """As a streamed model's do."""
    layer = _layer(Conv1D)
    true, x = layer.weight.clone(), torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    layer.weight.fill_(float("nan"))
    function = torch.nn.Sequential(layer)

    def bring(_module: torch.nn.Module, _inputs: object) -> None:
        layer.weight.copy_(true)

    function.register_forward_pre_hook(bring)
    with unread(layer):
        output = function(x)
    (found,) = torch.autograd.grad(output.sum(), x)
    assert torch.allclose(found, true.sum(1).unsqueeze(0), rtol=1e-12)


def test_a_layer_with_a_forward_function_of_its_own_keeps_it() -> None:
    layer, x = _layer(torch.nn.Linear), torch.ones(1, 6, dtype=torch.float64)
    layer.forward = lambda given: 2 * given
    with unread(layer):
        assert torch.equal(layer(x), 2 * x)
    assert torch.equal(layer(x), 2 * x)


def test_a_layer_that_something_wraps_gives_its_value() -> None:
    class Wrapped(torch.nn.Linear):
        """Any other class than the two plain ones."""

    layer, x = Wrapped(6, 4), torch.randn(3, 6)
    true = layer(x)
    with unread(layer):
        assert torch.equal(layer(x), true)
