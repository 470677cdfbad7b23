"""The large model's own forward pass, with the Bridge's weights in its backward pass.

Every linear layer of the large model's blocks gives what it gives, and sends errors back through the Bridge's weights
in place of its own:

    y = W x,    g_x = D_in^T W~^T D_out g_y

W~ being the Bridge's weight, D_in and D_out the Bridge's selections of the layer's inputs and outputs. All else
(norms, activations, attention) is differentiated as the large model computed it, so that only rounding and pruning of
the matrices make the error differ from backpropagation's. The large model's layers are only ever run forward: they may
be quantised, or read from disk and gone when the error comes back.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plugbridge.families.spec import Layout, Place
from plugbridge.models import few_logits, fuse_gelu
from plugbridge.shrink.packing import PackedLinear, matrices_of
from plugbridge.shrink.prune import BridgePlan
from plugbridge.streaming import window_opener
from plugbridge.tasks.encode import Encoded, gold
from plugbridge.tensors.axes import Project, transform
from plugbridge.tensors.patterns import axis_names
from plugbridge.transfer.backprop import coupled_exactly
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.fidelity import WaysBack
from plugbridge.transfer.kept import kept_in
from plugbridge.transfer.residual import head_loss
from plugbridge.tuners.module import attach, pack, parameter_name

Op = Tensor | None
"""Positions of an axis that the Bridge has (long), a projection (Bridge, large), or None where it has all of them."""


@dataclass(frozen=True)
class Back:
    """What an error takes on its way back through one linear layer.

    weight: gives the Bridge's weight (in, out) in a dtype; inputs, outputs: what it has of the layer's; `bound`: the
    share of the error's squared norm that may be left out by dropping positions, the smallest first.
    """

    weight: Callable[[torch.dtype], Tensor]
    inputs: Op
    outputs: Op
    size: int
    bound: float = 0.0

    def send(self, error: Tensor) -> Tensor:
        """The error at the layer's input. error: (…, out); returns (…, in)."""
        rows = error.reshape(-1, error.shape[-1])
        kept = carrying(rows, self.bound)
        if kept is not None:
            rows = rows[kept]
        weight = self.weight(error.dtype)
        found = _lift(_down(rows, self.outputs) @ weight.mT, self.inputs, self.size)
        if kept is not None:
            found = found.new_zeros(error.shape[:-1].numel(), self.size).index_copy_(0, kept, found)
        return found.view(*error.shape[:-1], self.size)


def carrying(rows: Tensor, bound: float) -> Tensor | None:
    """The rows (n, width) that carry all but `bound` of the squared norm, ascending; None for all of them.

    At a bound of 0 those that are zero are left out, which changes nothing.
    """
    squares = rows.float().square().sum(-1)
    wanted = squares > 0
    if bound > 0:
        ordered, order = squares.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        wanted = torch.zeros_like(wanted).index_copy_(0, order, before < (1 - bound) * squares.sum())
    kept = wanted.unsqueeze(1).nonzero()[:, 0]  # of two dimensions: a prediction of memory takes all of them
    return None if kept.numel() == rows.shape[0] else kept


def _down(x: Tensor, op: Op) -> Tensor:
    if op is None:
        return x
    return x @ op.to(x.dtype).mT if op.is_floating_point() else x.index_select(-1, op)


def _lift(x: Tensor, op: Op, size: int) -> Tensor:
    if op is None:
        return x
    if op.is_floating_point():
        return x @ op.to(x.dtype)
    return x.new_zeros(*x.shape[:-1], size).index_copy_(-1, op, x)


class _Through(torch.autograd.Function):
    """A layer's output, whose gradient at the input is `back`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Callable[[Tensor], Tensor], back: Back) -> Tensor:
        ctx.back = back
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.send(errors[0]), None, None


Way = Literal["bridge", "none", "exact"]
"""How errors come back: through the Bridge's weights, past the sublayers, or through the large model's own weights."""


@dataclass
class Switch:
    """The way that is taken; forward passes set it for their own way back."""

    way: Way = "bridge"


def send_through(coupling: Coupling, switch: Switch) -> None:
    """Have the linear layers of the large model's blocks send errors back the switch's way, from now on.

    To be called before a module is attached to either model.
    """
    large, bridge = coupling.large_model, coupling.pruned
    assert large is not None
    for path in matrices_of(large, coupling.large):
        layer = large.get_submodule(path)
        back = back_of(coupling, path, bridge.get_submodule(path))
        layer.forward = _forward(layer.forward, back, switch)
    for path, context in coupling.large.functions():
        large.get_submodule(path).register_forward_pre_hook(_cut(switch, context), with_kwargs=True)


def _forward(own: Callable[[Tensor], Tensor], back: Back, switch: Switch) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if switch.way != "bridge" or not x.requires_grad:
            return own(x)
        return cast(Tensor, cast(Any, _Through).apply(x, own, back))

    return forward


def _cut(switch: Switch, context: str | None) -> Callable[..., Any]:
    """A hook before a sublayer's function that lets no error out of it, where there is to be no way through."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if switch.way != "none":
            return None
        names = {"hidden_states", context} & keywords.keys()
        return tuple(detached(value) for value in inputs), {
            name: detached(value) if name in names else value for name, value in keywords.items()
        }

    return hook


def detached(value: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def back_of(coupling: Coupling, path: str, layer: nn.Module) -> Back:
    """The way back through one linear layer, for which the Bridge has `layer`; of a streamed one its block is read."""
    layout, plan = coupling.large, coupling.plan
    place, _ = layout.place_of(path)
    axes_in, axes_out = layout.linear_axes(path)
    device = next(layer.parameters()).device
    inputs, outputs = (op_of(layout, plan, axes, place, device) for axes in (axes_in, axes_out))
    weight = partial(weight_of, layer)
    opens = window_opener(coupling.pruned, path, layout)
    if opens is not None:
        weight = partial(_read_weight, opens, layer)
    return Back(weight, inputs, outputs, _size(layout, axes_in), coupling.error_bound)


def _read_weight(opens: Callable[[], None], layer: nn.Module, dtype: torch.dtype) -> Tensor:
    opens()
    return weight_of(layer, dtype)


def op_of(layout: Layout, plan: BridgePlan, axes: str, place: Place, device: torch.device) -> Op:
    """What a Bridge has of a dimension that joins these axes."""
    ops = plan.ops(layout, axes, place)
    projected = [op for op in ops.values() if isinstance(op, Project)]
    if projected:  # the residual stream, whose only axis it is
        return projected[0].matrix.to(device)
    index = transform(torch.arange(_size(layout, axes), device=device), axes, ops, layout.sizes)
    return None if index.numel() == _size(layout, axes) else index


def _size(layout: Layout, axes: str) -> int:
    return math.prod(layout.sizes[name] for name in axis_names(axes))


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight as (in, out), packed or not."""
    if isinstance(layer, PackedLinear):
        return layer.dense(dtype)
    weight = layer.get_parameter("weight").detach().to(dtype)
    return weight if isinstance(layer, Conv1D) else weight.mT


def through_loss(coupling: Coupling) -> WaysBack:
    """The exact loss of the plugged large model, whose gradient comes back through the Bridge's weights."""
    large = coupling.large_model
    assert large is not None
    fuse_gelu(large)
    switch = Switch()
    send_through(coupling, switch)
    wrapped, _ = attach(large, coupling.method, coupling.large, coupling.settings)
    large.requires_grad_(False)
    wrapped.eval()
    exact = coupled_exactly(coupling, wrapped)
    at_end = loss_at_end(coupling, large, wrapped)

    def by(way: Way) -> Loss:
        plain = exact if way == "exact" else at_end

        def loss(rows: list[Encoded]) -> Tensor:
            switch.way = way
            return plain(rows)

        return loss

    return WaysBack(by("bridge"), by("none"), by("exact"))


def loss_at_end(coupling: Coupling, large: PreTrainedModel, wrapped: nn.Module) -> Loss:
    """The plugged large model's loss, to be differentiated by autograd; its head runs at label positions only.

    What its blocks keep for that is in `kept_bits`, or as it is.
    """
    layout, kind, bits = coupling.large, coupling.encoder.kind, coupling.kept_bits
    spared = {} if coupling.method.stacked else {"use_cache": False}
    end = large.get_submodule(layout.family.stack[layout.family.prefix.stack].final_norm)

    def loss(rows: list[Encoded]) -> Tensor:
        module = pack(coupling.method, layout, coupling.at_large_width())
        replaced = {parameter_name(key): tensor for key, tensor in module.items()}
        batch = gold(coupling.encoder, rows).to(large.device)
        states: list[Tensor] = []
        hook = end.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
        keeping = nullcontext() if bits is None else kept_in(bits, replaced.values())
        try:
            with keeping:
                functional_call(wrapped, replaced, (), {**batch.inputs(kind), **few_logits(large, kind), **spared})
        finally:
            hook.remove()
        return head_loss(large, layout, states[0], batch, kind)

    return loss
