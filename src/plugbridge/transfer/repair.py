"""Repair of a Bridge before coupling, from forward passes of the large model only.

`response` fits every pruned sublayer so that it answers a small push of its input as the large
sublayer does, seen through down: what feedback and ladder_delta need of it. `logits` distils the
large model's next-token distributions (Hinton et al. 2015): what a Bridge that reads alone needs.
Both run on unlabelled text: the training prompts, without their answers. A seq2seq model's decoder then has one
position, where its self-attention has nothing to choose among: those queries and keys stay as they are.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from plugbridge.evaluate import at_least_float32
from plugbridge.families.spec import Layout
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import IGNORE, Batch, Encoded, Encoder, unlabelled
from plugbridge.transfer.coupling import Loss
from plugbridge.transfer.feedback import CACHE, Visit, bridge_arguments, record, visits_of
from plugbridge.transfer.residual import Width

RepairTarget = Literal["response", "logits"]
PUSH = 0.1
"""Size of the push, in root mean squares of the sublayer's input."""


def repair_loss(
    target: RepairTarget,
    large: PreTrainedModel,
    layout: Layout,
    bridge: PreTrainedModel,
    plan: BridgePlan,
    encoder: Encoder,
) -> Loss:
    """The loss of a batch of rows, in the Bridge's own weights."""
    large.requires_grad_(False)
    large.eval()
    bridge.eval()
    if target == "logits":
        return _logits(large, bridge, encoder)
    return _response(large, layout, bridge, plan, encoder)


def repaired_parameters(bridge: nn.Module, layout: Layout, target: RepairTarget) -> dict[str, nn.Parameter]:
    """What trains: everything for logits, the blocks' functions (not their norms) for responses."""
    named = dict(bridge.named_parameters())
    if target == "logits":
        return named
    functions = tuple(f"{path}." for path, _ in layout.functions())
    return {name: parameter for name, parameter in named.items() if name.startswith(functions)}


def _logits(large: PreTrainedModel, bridge: PreTrainedModel, encoder: Encoder) -> Loss:
    """Kullback-Leibler divergence from the large model's to the Bridge's distributions, mean over positions."""

    def loss(rows: list[Encoded]) -> Tensor:
        batch = unlabelled(encoder, rows).to(large.device)
        inputs = batch.inputs(encoder.kind)
        with torch.no_grad():
            right = torch.log_softmax(at_least_float32(large(**inputs).logits), -1)
        found = torch.log_softmax(at_least_float32(bridge(**inputs).logits), -1)
        kept = batch.attention_mask.bool() if encoder.kind == "causal" else batch.labels != IGNORE
        return (right.exp() * (right - found)).sum(-1)[kept].mean()

    return loss


def _response(
    large: PreTrainedModel, layout: Layout, bridge: PreTrainedModel, plan: BridgePlan, encoder: Encoder
) -> Loss:
    """Squared error of the responses relative to their size, mean over sublayers.

    The push is in the Bridge's own directions; a sublayer that also reads another stack's output is
    pushed there too.
    """
    width = Width(layout, plan)
    visits = [visit for name in layout.family.stack for visit in visits_of(layout, name)]

    def loss(rows: list[Encoded]) -> Tensor:
        batch = unlabelled(encoder, rows).to(large.device)
        with torch.no_grad(), record(large, width, visits, lambda _visit: True):
            large(**batch.inputs(encoder.kind))
        parts: list[Tensor] = []
        for visit in visits:
            push = PUSH * torch.randn_like(width.down(visit.x)) * visit.x.square().mean().sqrt()
            pushes: dict[str, Tensor] = {}
            if visit.sublayer.context is not None:
                name = visit.sublayer.context.argument
                other: Tensor = visit.arguments[name]
                pushes[name] = PUSH * torch.randn_like(width.down(other)) * other.square().mean().sqrt()
            kept = _kept(visit, batch, encoder.kind)
            with torch.no_grad():
                right = width.down(_answer(large, visit, visit.x, visit.arguments, push, pushes, width.lift))[kept]
            found = _answer(
                bridge, visit, visit.given(width).to(bridge.dtype), bridge_arguments(width, visit, bridge.dtype),
                push.to(bridge.dtype), {name: extra.to(bridge.dtype) for name, extra in pushes.items()}, lambda x: x,
            )[kept]  # fmt: skip
            right = right.to(found.dtype)
            parts.append((found - right).square().sum() / right.square().sum().clamp_min(1e-12))
        return torch.stack(parts).mean()

    return loss


def _kept(visit: Visit, batch: Batch, kind: str) -> Tensor:
    """Positions that are not padding, in the sublayer's stack."""
    if kind == "causal" or visit.place.stack == "encoder":
        return batch.attention_mask.bool()
    return batch.labels != IGNORE


def _answer(
    model: nn.Module,
    visit: Visit,
    x: Tensor,
    arguments: dict[str, Any],
    push: Tensor,
    pushes: dict[str, Tensor],
    widen: Callable[[Tensor], Tensor],
) -> Tensor:
    """How much a sublayer's output moves when its inputs are pushed."""
    function = model.get_submodule(f"{visit.path}.{visit.sublayer.function}")
    given = {name: (None if name == CACHE else value) for name, value in arguments.items()}
    moved = {name: cast(Tensor, given[name]) + widen(extra) for name, extra in pushes.items()}
    before, after = (
        functional_call(function, {}, (inputs,), changed)
        for inputs, changed in ((x, given), (x + widen(push), {**given, **moved}))
    )
    pair = [part[0] if isinstance(part, tuple) else part for part in (before, after)]
    return pair[1] - pair[0]
