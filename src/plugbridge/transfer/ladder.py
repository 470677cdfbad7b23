"""Ladder coupling: the large model's activations enter the Bridge layer by layer.

The large model runs forward without a graph and without the module. What enters its layers is
downsampled by learned projections and mixed into what enters the Bridge's layers (Sung et al. 2022,
"LST: Ladder Side-Tuning", section 3; their gates: sigmoid(alpha / 0.1), alpha = 0 at the start):

    b_l = g_l * b_l + (1 - g_l) * down_l(h_l)

Since the module is not in that forward pass, the activations of a row never change and may be kept.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.models import few_logits
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import Batch, Encoded, Encoder, gold
from plugbridge.tensors.axes import matrix_of
from plugbridge.transfer.cache import ActivationCache
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.residual import Width, head_loss
from plugbridge.transfer.standalone import bridge_loss
from plugbridge.tuners.module import attach, pack, parameter_name

TEMPERATURE = 0.1
Rungs = dict[str, str]
"""Module paths where the ladder touches, by rung name: every layer and every final norm."""
Heights = dict[str, Tensor]
"""The large model's activations by rung name, (n, length, hidden) each."""


def rungs_of(layout: Layout) -> Rungs:
    """Rung names and module paths, each stack from its embeddings to its final norm."""
    found: Rungs = {}
    for name, stack in layout.family.stack.items():
        for layer in range(layout.layers[name]):
            found[f"{name}:{layer}"] = stack.path.format(layer)
        found[f"{name}:end"] = stack.final_norm
    return found


def start_ladder(layout: Layout, plan: BridgePlan) -> dict[str, Tensor]:
    """Gates, half open, and down maps that begin as the Bridge's own choice of channels."""
    matrix = matrix_of(plan.op("hidden"), layout.sizes["hidden"])
    tensors: dict[str, Tensor] = {}
    for rung in rungs_of(layout):
        tensors[f"gate/{rung}"] = torch.zeros(())
        tensors[f"down/{rung}"] = matrix.float().clone()
    return tensors


@contextmanager
def recorded_heights(model: nn.Module, rungs: Rungs) -> Generator[Heights]:
    """What enters the rungs' modules while the block runs."""
    heights: Heights = {}

    def hook(rung: str) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            heights[rung] = (inputs[0] if inputs else keywords["hidden_states"]).detach()

        return keep

    with ExitStack() as hooks:
        for rung, path in rungs.items():
            handle = model.get_submodule(path).register_forward_pre_hook(hook(rung), with_kwargs=True)
            hooks.callback(handle.remove)
        yield heights


@contextmanager
def climbing(bridge: nn.Module, rungs: Rungs, ladder: dict[str, Tensor], heights: Heights) -> Generator[None]:
    """Mix the large model's activations into the Bridge while the block runs."""

    def hook(rung: str) -> Callable[..., Any]:
        def mix(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            given: Tensor = inputs[0] if inputs else keywords["hidden_states"]
            gate = torch.sigmoid(ladder[f"gate/{rung}"] / TEMPERATURE)
            height = heights[rung].to(given.dtype)
            mixed = gate * given + (1 - gate) * (height @ ladder[f"down/{rung}"].to(given.dtype).mT)
            if inputs:
                return (mixed, *inputs[1:]), keywords
            return inputs, {**keywords, "hidden_states": mixed}

        return mix

    with ExitStack() as hooks:
        for rung, path in rungs.items():
            handle = bridge.get_submodule(path).register_forward_pre_hook(hook(rung), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@dataclass
class Backbone:
    """The large model as the ladder sees it: rows to heights, remembered in a cache or not."""

    model: PreTrainedModel
    encoder: Encoder
    rungs: Rungs
    cache: ActivationCache | None = None

    @torch.no_grad()
    def heights(self, batch: Batch) -> Heights:
        """One forward pass; no cache."""
        with recorded_heights(self.model, self.rungs) as heights:
            self.model(**batch.inputs(self.encoder.kind), **few_logits(self.model, self.encoder.kind), use_cache=False)
        return heights

    def heights_of(self, rows: list[Encoded]) -> Heights:
        """Heights of training rows with their right options; rows seen before come from the cache."""
        cache = self.cache
        if cache is None:
            return self.heights(gold(self.encoder, rows).to(self.model.device))
        new = list(dict.fromkeys(row for row in rows if row not in cache))
        if new:
            batch = gold(self.encoder, new)
            stacks, kind = {rung.partition(":")[0] for rung in self.rungs}, self.encoder.kind
            lengths = {stack: [length_in(row, stack, kind) for row in new] for stack in stacks}
            found = self.heights(batch.to(self.model.device))
            for i, row in enumerate(new):
                cache.add(row, {rung: h[i, : lengths[rung.partition(":")[0]][i]] for rung, h in found.items()})
        return {rung: h.to(self.model.device) for rung, h in cache.get(rows).items()}


def length_in(row: Encoded, stack: str, kind: str) -> int:
    """Positions of a row with what training raises (`Encoded.target`) in a stack, padding not counted."""
    prompt, target = len(row.prompt), len(row.target)
    if kind == "causal":
        return prompt + target
    return prompt if stack == "encoder" else target


def ladder(coupling: Coupling) -> Loss:
    """The loss of the Bridge, module plugged in, with the large model's activations entering it."""
    large = cast(PreTrainedModel, coupling.large_model)
    large.requires_grad_(False)
    large.eval()
    rungs = rungs_of(coupling.large)
    if not coupling.ladder:
        coupling.ladder.update({k: t.to(large.device) for k, t in start_ladder(coupling.large, coupling.plan).items()})
    for tensor in coupling.ladder.values():
        tensor.requires_grad_(True)
    backbone = Backbone(large, coupling.encoder, rungs, coupling.cache)
    return bridge_loss(
        coupling, lambda rows: climbing(coupling.pruned, rungs, coupling.ladder, backbone.heights_of(rows))
    )


def norm_rungs(layout: Layout) -> Rungs:
    """Rungs at every norm that reads the residual stream, named as `rungs_of` names them."""
    found: Rungs = {}
    for name, stack in layout.family.stack.items():
        for layer in range(layout.layers[name]):
            for sublayer in stack.sublayers:
                found[f"{name}:{layer}:{sublayer.norm}"] = f"{stack.path.format(layer)}.{sublayer.norm}"
        found[f"{name}:end"] = stack.final_norm
    return found


def ladder_delta(coupling: Coupling) -> Loss:
    """The ladder that carries only what the module changes.

    The Bridge stays as it was pruned. Its sublayers F~ run without the module on what the large
    model's sublayers read, and with it on what they would read if the stream h were off by the lifted
    change d below; norms and head are the large model's own, at full width:

        d <- d + F~(down norm(h + lift d); module) - F~(down norm(h))

    With an unpruned Bridge this is the plugged large model itself.
    """
    large = cast(PreTrainedModel, coupling.large_model)
    for model in (large, coupling.pruned):
        model.requires_grad_(False)
        model.eval()
    layout, width, rungs = coupling.large, Width(coupling.large, coupling.plan), norm_rungs(coupling.large)
    backbone = Backbone(large, coupling.encoder, rungs, coupling.cache)
    wrapped, _ = attach(coupling.pruned, coupling.method, coupling.bridge_layout(), coupling.settings)
    wrapped.eval()
    wrapped.requires_grad_(False)
    dtype = coupling.pruned.dtype  # a large model in bfloat16 would round small changes of its stream away
    norms = {rung: deepcopy(large.get_submodule(path)).to(dtype) for rung, path in rungs.items()}
    kind, end = coupling.encoder.kind, f"{layout.family.prefix.stack}:end"

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, coupling.bridge_layout(), coupling.at_bridge_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        heights = {rung: height.to(dtype) for rung, height in backbone.heights_of(rows).items()}
        batch = gold(coupling.encoder, rows).to(large.device)
        inputs = _unread(batch, coupling)
        plain: Heights = {}
        changed: Heights = {}

        def unchanged(rung: str, given: Tensor) -> Tensor:
            plain[rung] = given
            return width.down(norms[rung](heights[rung]))

        def moved(rung: str, given: Tensor) -> Tensor:
            changed[rung] = heights[rung] + width.lift(given - plain[rung])
            return width.down(norms[rung](changed[rung]))

        with torch.no_grad(), cast(Any, wrapped).disable_adapter(), replaced_norms(coupling.pruned, rungs, unchanged):
            wrapped(**inputs)
        with replaced_norms(coupling.pruned, rungs, moved):
            functional_call(wrapped, replaced, (), inputs)
        return head_loss(large, layout, changed[end].to(large.dtype), batch, kind)

    return loss


def _unread(batch: Batch, coupling: Coupling) -> dict[str, Tensor]:
    """Inputs of the Bridge's forward pass where nothing of its own stream is read: zeros instead of tokens."""
    width = coupling.plan.sizes["hidden"]
    empty = torch.zeros(*batch.input_ids.shape, width, dtype=coupling.pruned.dtype, device=batch.input_ids.device)
    found = {"inputs_embeds": empty, "attention_mask": batch.attention_mask}
    if coupling.encoder.kind == "seq2seq":
        found["decoder_inputs_embeds"] = empty.new_zeros(*batch.labels.shape, width)
    return found


@contextmanager
def replaced_norms(bridge: nn.Module, rungs: Rungs, instead: Callable[[str, Tensor], Tensor]) -> Generator[None]:
    """While the block runs, `instead(rung, stream)` gives the output of the Bridge's norms."""

    def hook(rung: str) -> Callable[..., Tensor]:
        def put(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Tensor:
            return instead(rung, inputs[0])

        return put

    with ExitStack() as hooks:
        for rung, path in rungs.items():
            hooks.callback(bridge.get_submodule(path).register_forward_hook(hook(rung)).remove)
        yield


class LadderNetwork(nn.Module):
    """Large model, ladder and Bridge kept together: what Ladder Side-Tuning runs at inference."""

    def __init__(self, large: PreTrainedModel, layout: Layout, bridge: nn.Module, inner: nn.Module, ladder: Heights):
        super().__init__()
        self.large, self.bridge, self.inner = large, bridge, inner
        self.rungs, self.kind = rungs_of(layout), layout.family.kind
        self.ladder = ladder

    @property
    def config(self) -> PreTrainedConfig:
        """The large model's."""
        return self.large.config

    def forward(self, **inputs: Any) -> Any:
        """As the Bridge's own forward pass."""
        with torch.no_grad(), recorded_heights(self.large, self.rungs) as heights:
            self.large(**{**inputs, **few_logits(self.large, self.kind)}, use_cache=False)
        with climbing(self.bridge, self.rungs, self.ladder, heights):
            return self.inner(**inputs)
