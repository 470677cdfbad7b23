"""Standalone coupling: the Bridge reads the tokens by itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plugbridge.evaluate import mean_loss
from plugbridge.models import checkpoint_activations
from plugbridge.tasks.encode import Batch, Encoded, gold
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.tuners.module import attach, pack, parameter_name, trainable

MODEL = "model."


def standalone(coupling: Coupling) -> Loss:
    """The Bridge reads the tokens by itself, with the module plugged in at its width."""
    return bridge_loss(coupling, lambda _rows: nullcontext(), coupling.recompute and not coupling.method.stacked)


def bridge_loss(
    coupling: Coupling,
    during: Callable[[list[Encoded]], AbstractContextManager[None]],
    recompute: bool = False,
) -> Loss:
    """The loss of the Bridge with the module at its width; `during(rows)` surrounds its forward pass.

    With `recompute` every block is run again for its gradient (activation checkpointing), with less memory.
    """
    named = dict(coupling.bridge.named_parameters())
    wrapped, _ = attach(coupling.bridge, coupling.method, coupling.bridge_layout(), coupling.settings)
    names = set(trainable(wrapped))
    for parameter in named.values():  # peft froze them
        parameter.requires_grad_(coupling.train_bridge)
    wrapped.train(coupling.train_bridge)
    if recompute:
        _run_blocks_again(coupling)

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        assert set(replaced) == names
        batch = gold(coupling.encoder, rows).to(coupling.bridge.device)
        if recompute:
            weights = [parameter for parameter in named.values() if parameter.requires_grad]
            return _loss_with_gradients(wrapped, replaced, weights, batch, coupling.encoder.kind)

        def forward(**inputs: Any) -> Any:
            return functional_call(wrapped, replaced, (), inputs)

        with during(rows):
            return mean_loss(forward, batch, coupling.encoder.kind)

    return loss


def _run_blocks_again(coupling: Coupling) -> None:
    """Have transformers checkpoint the Bridge's blocks, which it does where a block is in training."""
    bridge, layout = coupling.bridge, coupling.bridge_layout()
    checkpoint_activations(bridge)
    for name, stack in layout.family.stack.items():
        for layer in range(layout.layers[name]):
            bridge.get_submodule(stack.path.format(layer)).training = True  # itself alone: its dropout stays as it is


class _WithGradients(nn.Module):
    """A model's loss and its gradients, all while the model's tensors are replaced: blocks are run again in there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, kind: str, wanted: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch and its gradients at `wanted`."""

        def run(**inputs: Any) -> Any:
            return self.model(**inputs, use_cache=False)

        value = mean_loss(run, batch, kind)
        return value.detach(), torch.autograd.grad(value, wanted, materialize_grads=True)


def _loss_with_gradients(
    model: nn.Module, replaced: dict[str, Tensor], weights: list[nn.Parameter], batch: Batch, kind: str
) -> Tensor:
    """The loss, differentiable in the replaced tensors and the weights as ever."""
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in replaced.items()}
    wanted = [*leaves.values(), *weights]
    inside = {f"{MODEL}{name}": leaf for name, leaf in leaves.items()}
    value, gradients = functional_call(_WithGradients(model), inside, (batch, kind, wanted))
    return cast(Tensor, _Known.apply(value, gradients, *replaced.values(), *weights))


class _Known(torch.autograd.Function):
    """A value whose gradients at some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *_tensors: Tensor) -> Tensor:
        ctx.gradients = list(gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        known: list[Tensor] = ctx.gradients
        ctx.gradients = []
        return None, None, *(gradient.mul_(factors[0]) for gradient in known)
