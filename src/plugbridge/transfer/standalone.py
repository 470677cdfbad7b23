"""Standalone coupling: the Bridge reads the tokens by itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.func import functional_call

from plugbridge.evaluate import mean_loss
from plugbridge.tasks.encode import Encoded, gold
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.tuners.module import attach, pack, parameter_name, trainable


def standalone(coupling: Coupling) -> Loss:
    """The Bridge reads the tokens by itself, with the module plugged in at its width."""
    return bridge_loss(coupling, lambda _rows: nullcontext())


def bridge_loss(coupling: Coupling, during: Callable[[list[Encoded]], AbstractContextManager[None]]) -> Loss:
    """The loss of the Bridge with the module at its width; `during(rows)` surrounds its forward pass."""
    named = dict(coupling.bridge.named_parameters())
    wrapped, _ = attach(coupling.bridge, coupling.method, coupling.bridge_layout(), coupling.settings)
    names = set(trainable(wrapped))
    for parameter in named.values():  # peft froze them
        parameter.requires_grad_(coupling.train_bridge)
    wrapped.train(coupling.train_bridge)

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        assert set(replaced) == names
        batch = gold(coupling.encoder, rows).to(coupling.bridge.device)

        def forward(**inputs: Any) -> Any:
            return functional_call(wrapped, replaced, (), inputs)

        with during(rows):
            return mean_loss(forward, batch, coupling.encoder.kind)

    return loss
