"""Standalone coupling: the Bridge reads the tokens by itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plugbridge.evaluate import mean_loss
from plugbridge.models import checkpoint_activations
from plugbridge.tasks.encode import Batch, Encoded, gold
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.deferred import Deferred
from plugbridge.tuners.module import attach, pack, parameter_name, trainable

MODEL = "model."


def standalone(coupling: Coupling) -> Loss:
    """The Bridge reads the tokens by itself, with the module plugged in at its width."""
    return bridge_loss(coupling, None)


def bridge_loss(coupling: Coupling, during: Callable[[list[Encoded]], AbstractContextManager[None]] | None) -> Loss:
    """The loss of the Bridge with the module at its width; `during(rows)` surrounds its forward pass.

    Where nothing does, blocks may be run again for their gradient (`Coupling.recompute`: activation checkpointing).
    """
    recompute = during is None and coupling.recompute and not coupling.method.stacked
    named = dict(coupling.pruned.named_parameters())
    wrapped, _ = attach(coupling.pruned, coupling.method, coupling.bridge_layout(), coupling.settings)
    names = set(trainable(wrapped))
    for parameter in named.values():  # peft froze them
        parameter.requires_grad_(coupling.train_bridge)
    wrapped.train(coupling.train_bridge)
    for name, part in wrapped.named_modules():
        if name.endswith(".lora_dropout.default"):  # the module trains, whether the Bridge does or not
            part.train()
    if recompute:
        _run_blocks_again(coupling)

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        assert set(replaced) == names
        batch = gold(coupling.encoder, rows).to(coupling.pruned.device)
        if recompute:  # of prefixes, checkpointing would drop the cache that holds them
            return _loss_inside(wrapped, replaced, batch, coupling.encoder.kind)

        def forward(**inputs: Any) -> Any:
            return functional_call(wrapped, replaced, (), inputs)

        with during(rows) if during is not None else nullcontext():
            return mean_loss(forward, batch, coupling.encoder.kind)

    return loss


def _run_blocks_again(coupling: Coupling) -> None:
    """Have transformers checkpoint the Bridge's blocks, which it does where a block is in training."""
    bridge, layout = coupling.pruned, coupling.bridge_layout()
    checkpoint_activations(bridge)
    for name, stack in layout.family.stack.items():
        for layer in range(layout.layers[name]):
            bridge.get_submodule(stack.path.format(layer)).training = True  # itself alone: its dropout stays as it is


class _Inside(nn.Module):
    """Something done with a model, as the forward pass of a module: its tensors can be replaced meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        """What `work` gives for the model."""
        return work(self.model)


def _loss_inside(model: nn.Module, replaced: dict[str, Tensor], batch: Batch, kind: str) -> Tensor:
    """A batch's loss, whose backward pass runs with the tensors replaced, too: blocks are run again in there.

    It ends in the weights' own ``grad``, as ever in a backward pass; `torch.autograd.grad` reaches `replaced` only.
    """
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in replaced.items()}
    inside = partial(functional_call, _Inside(model), {f"{MODEL}{name}": leaf for name, leaf in leaves.items()})

    def forward(model: nn.Module) -> Tensor:
        return mean_loss(partial(model, use_cache=False), batch, kind)

    with torch.enable_grad():
        value = cast(Tensor, inside((forward,)))

    def backward(factor: Tensor) -> list[Tensor | None]:
        def work(_model: nn.Module) -> None:
            value.backward(factor)  # pyright: ignore[reportUnknownMemberType]

        inside((work,))
        return [leaf.grad for leaf in leaves.values()]

    return cast(Tensor, Deferred.apply(value.detach(), backward, *replaced.values()))
