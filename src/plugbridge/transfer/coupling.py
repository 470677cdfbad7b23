"""What a coupling mode works with: module, plug, down and Bridge, and the tensors that train."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.config.stages import Activations
from plugbridge.families.spec import Layout
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.transfer.cache import ActivationCache
from plugbridge.transfer.down import Down, apply_down
from plugbridge.transfer.kept import KeptBits
from plugbridge.transfer.plug import Plug, apply_plug
from plugbridge.tuners.module import Module, Slot, pack
from plugbridge.tuners.table import Method, MethodSettings

Loss = Callable[[list[Encoded]], Tensor]


@dataclass(frozen=True)
class Coupling:
    """Everything a mode works with; the tensors of `module`, `plug`, `down` and `ladder` train in place.

    `module` is at small width with one entry per large layer. `small` and `large` are the models'
    layouts, `bridge` the pruned model, `large_model` the large one for modes that run it. `ladder`
    and `cache` are the ladder's own: its gates and projections, and where activations are kept.
    `bridge` is None where none is read (`identity`, or a start that is plugged in as it is), the plan then
    `without_bridge`.
    `first` is the first layer of each stack whose module trains; 0 where it is not named. `still` are stacks and layers
    above it whose module stays as it starts, put there before the first step. `recompute`
    says that feedback runs a module's own sublayer again instead of keeping what its first run left, with
    what norms are at the Bridge's width, and standalone the Bridge's blocks. `perturbation` is how far mezo moves
    the module, `micro_batch` how many rows go through a block at a time in backprop.
    """

    method: Method
    settings: MethodSettings
    small: Layout
    large: Layout
    plan: BridgePlan
    bridge: PreTrainedModel | None
    encoder: Encoder
    module: Module
    plug: Plug
    down: Down
    train_bridge: bool
    large_model: PreTrainedModel | None = None
    ladder: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    cache: ActivationCache | None = None
    first: dict[str, int] = field(default_factory=dict[str, int])
    still: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    recompute: bool = True
    activations: Activations = "bridge"
    error_bound: float = 0.0
    kept_bits: KeptBits | None = None
    perturbation: float = 1e-3
    micro_batch: int | None = None

    @property
    def pruned(self) -> PreTrainedModel:
        """The Bridge, where there is one."""
        assert self.bridge is not None
        return self.bridge

    def trains(self, slot: Slot) -> bool:
        """Whether a slot's tensor trains."""
        return self.has_module(slot) and (slot.stack, slot.layer) not in self.still

    def has_module(self, slot: Slot) -> bool:
        """Whether a slot is of the layers whose module is used."""
        return slot.layer >= self.first.get(slot.stack, 0)

    def bridge_layout(self) -> Layout:
        """The Bridge's axes: the large model's layers at the plan's sizes."""
        return Layout(self.large.family, dict(self.plan.sizes), dict(self.large.layers))

    def at_large_width(self) -> Module:
        """The module as the large model would carry it, without a graph where it does not train."""
        wide = apply_plug(self.method, self.small, self.large, self.plug, self.module)
        return {slot: tensor if self.trains(slot) else tensor.detach() for slot, tensor in wide.items()}

    def at_bridge_width(self) -> Module:
        """The module as the Bridge carries it: plug, then down."""
        return apply_down(self.method, self.large, self.plan, self.down, self.at_large_width())

    def parameters(self) -> dict[str, Tensor]:
        """What trains, by name: ``module/…``, ``plug/…``, ``down/…``, ``ladder/…``, ``bridge/…``."""
        found: dict[str, Tensor] = {
            f"module/{s.stack}:{s.layer}:{s.site}:{s.tensor}": t for s, t in self.module.items()
        }
        found.update({f"plug/{key}": t for key, t in self.plug.items()})
        found.update({f"down/{key}": t for key, t in self.down.items()})
        found.update({f"ladder/{key}": t for key, t in self.ladder.items()})
        if self.train_bridge:
            found.update({f"bridge/{name}": p for name, p in self.pruned.named_parameters()})
        return found


def without_bridge(layout: Layout) -> BridgePlan:
    """The plan where no Bridge is read: it has no channel of the residual stream."""
    return BridgePlan({**layout.sizes, "hidden": 0}, {"hidden": torch.empty(0, dtype=torch.long)})


def drop_vocabulary(bridge: PreTrainedModel, layout: Layout) -> None:
    """Take a Bridge's embeddings and head away: for modes in which it neither reads tokens nor predicts any.

    Their numbers of rows stay, by which peft finds the embeddings.
    """
    names = layout.vocabulary()
    for name, old in list(bridge.named_parameters(remove_duplicate=False)):
        if name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(
                bridge.get_submodule(owner), leaf, nn.Parameter(old.new_empty(old.shape[0], 0), requires_grad=False)
            )
    bridge.set_output_embeddings(nn.Identity())


@torch.no_grad()
def silence(coupling: Coupling) -> None:
    """Set the tensors that do not train to zero: no LoRA, no adapter. A prefix stays, none cannot be had."""
    if not coupling.method.stacked:
        for slot, tensor in coupling.module.items():
            if not coupling.has_module(slot):
                tensor.zero_()


def require_gradients(coupling: Coupling) -> None:
    """Make the coupling's tensors leaves that train."""
    for slot, tensor in coupling.module.items():
        tensor.requires_grad_(coupling.trains(slot))
    for tensor in (*coupling.plug.values(), *coupling.down.values()):
        tensor.requires_grad_(True)


@torch.no_grad()
def bridge_state(coupling: Coupling) -> dict[str, Tensor]:
    """Checkpoint tensors of the module at the Bridge's width."""
    module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
    return {key: tensor.detach().cpu() for key, tensor in module.items()}
