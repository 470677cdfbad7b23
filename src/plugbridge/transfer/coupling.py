"""What a coupling mode works with: module, plug, down and Bridge, and the tensors that train."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.transfer.down import Down, apply_down
from plugbridge.transfer.plug import Plug, apply_plug
from plugbridge.tuners.module import Module, pack
from plugbridge.tuners.table import Method, MethodSettings

Loss = Callable[[list[Encoded]], Tensor]


@dataclass(frozen=True)
class Coupling:
    """Everything a mode works with; the tensors of `module`, `plug` and `down` train in place.

    `module` is at small width with one entry per large layer. `small` and `large` are the models'
    layouts, `bridge` the pruned model, `large_model` the large one for modes that run it.
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
    large_model: PreTrainedModel | None = None

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
