"""Training module, plug and Bridge together (Jin et al. 2023, Algorithm 1, lines 5 to 7).

A coupling mode is one function behind one name in `MODES`: it takes a `Coupling` and returns the
loss of a batch. What trains is in the coupling's dictionaries, whatever the mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from plugbridge.errors import ConfigError
from plugbridge.evaluate import mean_loss
from plugbridge.families.spec import Layout
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.transfer.down import Down, apply_down
from plugbridge.transfer.plug import Plug, apply_plug
from plugbridge.tuners.module import Module, attach, pack, parameter_name, trainable
from plugbridge.tuners.table import Method, MethodSettings

Loss = Callable[[list[Encoded]], Tensor]


@dataclass(frozen=True)
class Coupling:
    """Everything a mode works with; the tensors of `module`, `plug` and `down` train in place.

    `module` is at small width with one entry per large layer. `small` and `large` are the models'
    layouts, `bridge` the pruned model.
    """

    method: Method
    settings: MethodSettings
    small: Layout
    large: Layout
    plan: BridgePlan
    bridge: PreTrainedModel
    encoder: Encoder
    module: Module
    plug: Plug
    down: Down
    train_bridge: bool

    def bridge_layout(self) -> Layout:
        """The Bridge's axes: the large model's layers at the plan's sizes."""
        return Layout(self.large.family, dict(self.plan.sizes), dict(self.large.layers))

    def at_large_width(self) -> Module:
        """The module as the large model would carry it."""
        return apply_plug(self.method, self.small, self.large, self.plug, self.module)

    def at_bridge_width(self) -> Module:
        """The module as the Bridge carries it: plug, then down."""
        return apply_down(self.method, self.large, self.plan, self.down, self.at_large_width())

    def parameters(self) -> dict[str, Tensor]:
        """What trains, by name: ``module/…``, ``plug/…``, ``down/…``, ``bridge/…``."""
        found: dict[str, Tensor] = {
            f"module/{s.stack}:{s.layer}:{s.site}:{s.tensor}": t for s, t in self.module.items()
        }
        found.update({f"plug/{key}": t for key, t in self.plug.items()})
        found.update({f"down/{key}": t for key, t in self.down.items()})
        if self.train_bridge:
            found.update({f"bridge/{name}": p for name, p in self.bridge.named_parameters()})
        return found


def standalone(coupling: Coupling) -> Loss:
    """The Bridge reads the tokens by itself, with the module plugged in at its width."""
    named = dict(coupling.bridge.named_parameters())
    wrapped, _ = attach(coupling.bridge, coupling.method, coupling.bridge_layout(), coupling.settings)
    names = set(trainable(wrapped))
    for parameter in named.values():  # peft froze them
        parameter.requires_grad_(coupling.train_bridge)
    wrapped.train(coupling.train_bridge)
    kind = coupling.encoder.kind

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        assert set(replaced) == names
        batch = gold(coupling.encoder, rows).to(coupling.bridge.device)

        def forward(**inputs: Any) -> Any:
            return functional_call(wrapped, replaced, (), inputs)

        return mean_loss(forward, batch, kind)

    return loss


MODES: dict[str, Callable[[Coupling], Loss]] = {"standalone": standalone}


def find_mode(name: str) -> Callable[[Coupling], Loss]:
    """A coupling mode by name. Raises ConfigError."""
    if name not in MODES:
        raise ConfigError(f"no coupling mode '{name}'; known: {', '.join(MODES)}")
    return MODES[name]


def require_gradients(coupling: Coupling) -> None:
    """Make the coupling's tensors leaves that train."""
    for tensors in (coupling.module, coupling.plug, coupling.down):
        for tensor in tensors.values():
            tensor.requires_grad_(True)


@torch.no_grad()
def bridge_state(coupling: Coupling) -> dict[str, Tensor]:
    """Checkpoint tensors of the module at the Bridge's width."""
    module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
    return {key: tensor.detach().cpu() for key, tensor in module.items()}
