"""The residual stream at the large model's and the Bridge's width, and the loss at its end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.evaluate import at_least_float32
from plugbridge.families.spec import Layout, Place
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tasks.encode import IGNORE, Batch
from plugbridge.tensors.axes import Project, transform


@dataclass(frozen=True)
class Width:
    """The down map of activations: (…, large hidden) to (…, Bridge hidden), and its transpose."""

    layout: Layout
    plan: BridgePlan

    def down(self, x: Tensor) -> Tensor:
        return self.plan.op("hidden").apply(x, x.dim() - 1)

    def lift(self, x: Tensor) -> Tensor:
        op = self.plan.op("hidden")
        if isinstance(op, Project):
            return x @ op.matrix.to(x.device, x.dtype)
        wide = x.new_zeros(*x.shape[:-1], self.layout.sizes["hidden"])
        return wide.index_copy_(-1, op.index.to(x.device), x)

    def argument(self, value: Any, pattern: str, place: Place) -> Any:
        """A function's further argument at Bridge width."""
        if not isinstance(value, Tensor):
            return value
        return transform(value, pattern, self.plan.ops(self.layout, pattern, place), self.layout.sizes)


def head_loss(model: PreTrainedModel, layout: Layout, last: Tensor, batch: Batch, kind: str) -> Tensor:
    """The batch's loss (`evaluate.mean_loss`) from the last hidden state: final norm and head, label positions only.

    last: (n, length, hidden). Differentiable in it, and exact.
    """
    stack = layout.family.stack[layout.family.prefix.stack]
    wanted = batch.labels != IGNORE
    if kind == "causal":  # the state before a token predicts it
        wanted = torch.cat([wanted[:, 1:], torch.zeros_like(wanted[:, :1])], 1)
        labels = torch.cat([batch.labels[:, 1:], batch.labels[:, :1]], 1)[wanted]
    else:
        labels = batch.labels[wanted]
    state = model.get_submodule(stack.final_norm)(last[wanted])
    scale = layout.family.logit_scale
    if scale is not None and getattr(model.config, scale.flag, False):
        state = state * layout.sizes[scale.axis] ** scale.power
    logits = model.get_submodule(layout.family.head)(state)
    if batch.weights is None:
        return nn.functional.cross_entropy(at_least_float32(logits), labels)
    losses = nn.functional.cross_entropy(at_least_float32(logits), labels, reduction="none")
    return (losses * batch.weights[wanted.nonzero()[:, 0]].to(losses.dtype)).sum()
