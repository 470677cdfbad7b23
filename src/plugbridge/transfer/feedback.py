"""Feedback coupling: exact forward through the large model, error sent back through the Bridge.

The large model runs forward without a graph, modules plugged in. The loss and its gradient at the
last hidden state are exact. From there the error g goes down the residual stream; at each sublayer
F with its norm the Bridge's pruned F~ stands in for F's Jacobian:

    g_in = g + down^T down J_norm^T down^T J_F~(down norm(h))^T down g

(a LayerNorm's mean excepted, which reaches every channel), J_norm being the norm's Jacobian at its normalised input as
the Bridge sees it.

Each module takes its gradient from g at its own place, through its own sublayer only. No graph
crosses a sublayer and no weight of the large model gets a gradient. With an unpruned Bridge (r = 1)
this is backpropagation.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from plugbridge.evaluate import at_least_float32
from plugbridge.families.spec import Layout, Place, Sublayer
from plugbridge.models import fuse_gelu, last_positions
from plugbridge.tasks.encode import Batch, Encoded, gold
from plugbridge.transfer.backprop import coupled_exactly
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.fidelity import WaysBack
from plugbridge.transfer.prefix_cache import layer_prefix
from plugbridge.transfer.residual import Width, head_loss
from plugbridge.transfer.residual_gradient import NarrowNorm, ResidualGradient
from plugbridge.transfer.through import detached, through_loss
from plugbridge.transfer.unread import unread
from plugbridge.tuners.module import Module, attach, pack, parameter_name

CACHE = "past_key_values"
Norms = Callable[[str], NarrowNorm]
"""The norms of the large model between the Bridge's channels, by their paths."""


@dataclass
class Visit:
    """What one sublayer's forward pass leaves for the backward pass.

    low: (n, length, Bridge hidden) what the norm gives as the Bridge sees it, or x: (n, length, hidden) the
    same at full width where a module of its own needs it; unit: (n, length, Bridge hidden)
    the same before the norm's weight and bias; inverse: (n, length, 1) the norm's 1/rms or 1/std; arguments:
    the function's further arguments; output: (n, length, hidden) where the function ran with a graph of its
    own, which it holds.
    """

    path: str
    place: Place
    sublayer: Sublayer
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    unit: Tensor = field(default_factory=lambda: torch.empty(0))
    inverse: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    output: Tensor | None = None

    def given(self, width: Width) -> Tensor:
        """What the norm gives as the Bridge sees it."""
        return self.low if self.x.numel() == 0 else width.down(self.x)

    def clear(self) -> None:
        """Let go of all that the forward pass left."""
        self.low = self.x = self.unit = self.inverse = torch.empty(0)
        self.arguments, self.output = {}, None


def norm_path(visit: Visit) -> str:
    """The path of a sublayer's norm."""
    return f"{visit.path}.{visit.sublayer.norm}"


def visits_of(layout: Layout, stack_name: str) -> list[Visit]:
    """The sublayers of a stack in the order in which they run."""
    stack = layout.family.stack[stack_name]
    return [
        Visit(stack.path.format(layer), Place(stack_name, layer), sublayer)
        for layer in range(layout.layers[stack_name])
        for sublayer in stack.sublayers
    ]


@contextmanager
def record(
    model: nn.Module,
    width: Width,
    visits: list[Visit],
    keep: Callable[[Visit], bool],
    given: Callable[[Visit, Tensor], dict[str, Any]] | None = None,
    norms: bool = False,
) -> Generator[dict[str, Tensor]]:
    """Fill visits while the model runs without a graph; yields the input of every stack's final norm, by stack.

    `keep` says whether a visit, its arguments known, keeps its input at full width. With `given`, the arguments that
    its own module changes, its function runs with a graph instead and the visit keeps the output. With `norms` visits
    keep what their norms' Jacobians are made of.
    """
    layout = width.layout
    last: dict[str, Tensor] = {}
    eps: float = getattr(model.config, layout.family.norm_eps)
    centred = layout.family.norm == "layernorm"

    def on_norm(visit: Visit) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            h = at_least_float32(inputs[0].detach())
            if centred:
                h = h - h.mean(-1, keepdim=True)  # torch.var would be an order of magnitude slower
            square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / h.shape[-1]
            visit.inverse = torch.rsqrt(square + eps)
            visit.unit = (width.down(h) * visit.inverse).to(inputs[0].dtype)

        return hook

    def on_function(visit: Visit) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            arguments = dict(keywords)
            x = (inputs[0] if inputs else arguments.pop("hidden_states")).detach()
            if CACHE in arguments:  # that there is one is all that is asked later; its tensors need not stay
                arguments[CACHE] = None
            visit.arguments = arguments
            own = keep(visit)
            if own and given is None:
                visit.x = x
                return None
            visit.low = width.down(x)
            if not own or given is None:
                return None
            torch.set_grad_enabled(True)
            return inputs, {**keywords, **given(visit, x)}

        return hook

    def after_function(visit: Visit) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            torch.set_grad_enabled(False)
            visit.output = first_of(output)
            if isinstance(output, tuple):
                return tuple(detached(part) for part in cast(tuple[Any, ...], output))
            return detached(output)

        return hook

    def on_last(stack: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            last[stack] = inputs[0].detach()

        return hook

    with ExitStack() as hooks:
        for visit in visits:
            if norms:
                norm = model.get_submodule(norm_path(visit))
                hooks.callback(norm.register_forward_pre_hook(on_norm(visit)).remove)
            function = model.get_submodule(f"{visit.path}.{visit.sublayer.function}")
            hooks.callback(function.register_forward_pre_hook(on_function(visit), with_kwargs=True).remove)
            if given is not None:
                hooks.callback(function.register_forward_hook(after_function(visit)).remove)
        for name, stack in layout.family.stack.items():
            norm = model.get_submodule(stack.final_norm)
            hooks.callback(norm.register_forward_pre_hook(on_last(name)).remove)
        yield last


def first_of(output: Any) -> Tensor:
    """What a function gives: its output, of a tuple the first."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def head_gradient(
    model: PreTrainedModel, layout: Layout, last: Tensor, batch: Batch, kind: str
) -> tuple[Tensor, Tensor]:
    """Loss and its exact gradient at the last hidden state. last: (n, length, hidden)."""
    with torch.enable_grad():
        state = last.detach().requires_grad_(True)
        loss = head_loss(model, layout, state, batch, kind)
        (gradient,) = torch.autograd.grad(loss, state)
    return loss.detach(), gradient


def prefix_cache(coupling: Coupling, layout: Layout, module: Module, visit: Visit, x: Tensor) -> Any:
    """A cache that holds one layer's prefix, as the attention of that layer expects it beside x."""
    layer = cast(int, visit.place.layer)
    (value,) = (t for s, t in module.items() if (s.stack, s.layer) == (layout.family.prefix.stack, layer))
    return layer_prefix(layout, coupling.encoder.kind == "seq2seq", value, layer, x)


def call(
    coupling: Coupling,
    layout: Layout,
    model: nn.Module,
    visit: Visit,
    module: Module,
    x: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """One sublayer's function on x, to be differentiated, with a module's tensors in place of the attached ones.

    What it returns has the function's graph; its value is not to be read. The last product is spared where that can be.
    """
    path = f"{visit.path}.{visit.sublayer.function}"
    function = model.get_submodule(path)
    given = {**arguments, **own_arguments(coupling, layout, visit, module, x)}
    replaced: dict[str, Tensor] = {}
    if not coupling.method.stacked:
        head = f"base_model.model.{path}."
        own = {key: tensor for key, tensor in pack(coupling.method, layout, module).items() if key.startswith(head)}
        replaced = {parameter_name(key).removeprefix(head): tensor for key, tensor in own.items()}
    last = layout.family.stack[cast(str, visit.place.stack)].last_linear(visit.sublayer)
    with unread(model.get_submodule(f"{visit.path}.{last}")):
        return first_of(functional_call(function, replaced, (x,), given))


def own_arguments(coupling: Coupling, layout: Layout, visit: Visit, module: Module, x: Tensor) -> dict[str, Any]:
    """The arguments of a sublayer that do not come from below: its module's prefix, or no cache."""
    if CACHE not in visit.arguments:
        return {}
    reads_prefix = visit.place.stack == layout.family.prefix.stack and visit.sublayer.context is None
    if not coupling.method.stacked or not reads_prefix:
        return {CACHE: None}
    return {CACHE: prefix_cache(coupling, layout, module, visit, x)}


def bridge_arguments(width: Width, visit: Visit, dtype: torch.dtype) -> dict[str, Any]:
    """The further arguments of a sublayer's function as the Bridge takes them: at its width, in its dtype."""
    axes = visit.sublayer.inputs
    given = visit.arguments.items()
    narrow = {name: width.argument(value, axes[name], visit.place) if name in axes else value for name, value in given}
    return {name: in_dtype(value, dtype) for name, value in narrow.items()}


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """An argument with its floating tensors in a dtype, those in a tuple too; masks of bits stay."""
    if isinstance(value, tuple):
        return tuple(in_dtype(part, dtype) for part in cast(tuple[Any, ...], value))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def identity(coupling: Coupling) -> Loss:
    """A control: feedback without a Bridge. Every layer gets the error of the stack's end as it is.

    What reaches a layer only through a sublayer (T5's encoder, from the decoder) gets no error.
    """
    return feedback(coupling, through_bridge=False)


def feedback(coupling: Coupling, through_bridge: bool = True) -> Loss:
    """The exact loss of the plugged large model; its gradient comes through the Bridge."""
    if through_bridge and coupling.activations == "large":
        return through_loss(coupling)
    large = coupling.large_model
    assert large is not None
    layout, narrow = coupling.large, coupling.bridge_layout()
    width = Width(layout, coupling.plan)
    kind = coupling.encoder.kind
    spared: dict[str, Any] = {}
    if kind == "causal":
        spared["logits_to_keep"] = last_positions(1, large.device)  # the head runs in `head_gradient`
    if not coupling.method.stacked:
        spared["use_cache"] = False
    wrapped, _ = attach(large, coupling.method, layout, coupling.settings)
    bridge = coupling.pruned if through_bridge else None
    if bridge is not None:
        attach(bridge, coupling.method, narrow, coupling.settings)
        bridge.eval()
    for model in (large, bridge):
        if model is not None:
            fuse_gelu(model)
            model.requires_grad_(False)
    wrapped.eval()
    dtype = bridge.dtype if bridge is not None else next(iter(coupling.module.values())).dtype
    stacks = {name: _needed(coupling, visits_of(layout, name)) for name in layout.family.stack}
    needed = [visit for visits in stacks.values() for visit in visits]

    def norm_at(path: str) -> NarrowNorm:
        return NarrowNorm(width, large.get_submodule(path), dtype, keep=not coupling.recompute)

    norms: Norms | None = None
    if through_bridge:
        norms = norm_at
        if not coupling.recompute:  # made now: what is kept between steps is there from the first on
            norms = {path: norm_at(path) for path in map(norm_path, needed)}.__getitem__

    def by(norms: Norms | None) -> Loss:
        def loss(rows: list[Encoded]) -> Tensor:
            wide = coupling.at_large_width()
            small = coupling.at_bridge_width() if norms is not None else {}
            local = {slot: t.detach().requires_grad_(True) for slot, t in wide.items()}
            through = {slot: t.detach() for slot, t in small.items()}
            batch = gold(coupling.encoder, rows).to(large.device)
            replaced = {parameter_name(k): t for k, t in pack(coupling.method, layout, local).items()}
            owns = partial(_owns, coupling, local)
            given = None if coupling.recompute else partial(_given, coupling, local)
            with torch.no_grad(), record(large, width, needed, owns, given, norms is not None) as last:
                functional_call(wrapped, replaced, (), {**batch.inputs(kind), **spared})
            reader = layout.family.prefix.stack
            value, error = head_gradient(large, layout, last[reader], batch, kind)
            error = error.to(dtype)
            low = coupling.plan.sizes["hidden"]
            context = {name: error.new_zeros(*h.shape[:-1], low) for name, h in last.items()}
            send_back(coupling, width, narrow, stacks[reader], error, local, through, context, norms)
            for name, visits in stacks.items():
                if name != reader:
                    h = last[name].requires_grad_(True)
                    with torch.enable_grad():
                        out = large.get_submodule(layout.family.stack[name].final_norm)(h)
                        (error,) = torch.autograd.grad(out, h, width.lift(context[name]).to(out.dtype))
                    error = error.to(dtype)
                    send_back(coupling, width, narrow, visits, error, local, through, context, norms)
            for visit in needed:
                visit.clear()
            gradients = {slot: tensor.grad for slot, tensor in local.items()}
            parts = [(g.to(wide[slot].dtype) * wide[slot]).sum() for slot, g in gradients.items() if g is not None]
            surrogate = torch.stack(parts).sum()
            return value + (surrogate - surrogate.detach())  # zero first: the loss stays exact

        return loss

    if norms is None:
        return by(None)
    return WaysBack(by(norms), by(None), coupled_exactly(coupling, wrapped))


def send_back(
    coupling: Coupling,
    width: Width,
    narrow: Layout,
    visits: list[Visit],
    error: Tensor,
    local: Module,
    through: Module,
    context: dict[str, Tensor],
    norms: Norms | None,
) -> ResidualGradient:
    """Carry the error from the end of a stack to its start, in the Bridge's dtype whatever the large model's.

    Adds every module's gradient to `local`'s tensors and, for sublayers that read another stack's output, the error
    there, at the Bridge's width, to `context`. Returns the error where it stopped. Without `norms` it stays as it is.
    """
    gradient = ResidualGradient(width, error)
    for visit in reversed(visits):
        _local_gradient(coupling, visit, gradient, local)
        if norms is None:
            continue
        x = visit.given(width).to(error.dtype, copy=True).requires_grad_(True)
        arguments = bridge_arguments(width, visit, error.dtype)
        wanted = [x]
        link = visit.sublayer.context
        if link is not None:
            arguments[link.argument] = arguments[link.argument].detach().requires_grad_(True)
            wanted.append(arguments[link.argument])
        with torch.enable_grad():
            output = call(coupling, narrow, coupling.pruned, visit, through, x, arguments)
            back = torch.autograd.grad(output, wanted, gradient.low())
        if link is not None:
            context[link.stack] += back[1]
        norm = norms(norm_path(visit))
        gradient.add(*norm.backward(x.detach(), visit.unit.to(error.dtype), visit.inverse.to(error.dtype), back[0]))
    return gradient


def _needed(coupling: Coupling, visits: list[Visit]) -> list[Visit]:
    """The sublayers the error must pass: down to the first module that trains.

    A stack that feeds errors to another is passed whole.
    """
    if any(visit.sublayer.context for visit in visits):
        return visits
    return [v for v in visits if (v.place.layer or 0) >= coupling.first.get(v.place.stack or "", 0)]


def _own(coupling: Coupling, visit: Visit, local: Module) -> list[Tensor]:
    """The tensors of `local` that train and act in a sublayer."""
    return [
        tensor
        for slot, tensor in local.items()
        if coupling.trains(slot)
        and (slot.stack, slot.layer) == (visit.place.stack, visit.place.layer)
        and (slot.site.startswith(f"{visit.sublayer.function}.") or (slot.site == "" and CACHE in visit.arguments))
        and not (slot.site == "" and visit.sublayer.context is not None)
    ]


def _owns(coupling: Coupling, local: Module, visit: Visit) -> bool:
    return bool(_own(coupling, visit, local))


def _given(coupling: Coupling, local: Module, visit: Visit, x: Tensor) -> dict[str, Any]:
    return own_arguments(coupling, coupling.large, visit, local, x)


def _local_gradient(coupling: Coupling, visit: Visit, error: ResidualGradient, local: Module) -> None:
    """Exact gradient of a sublayer's own module given the error at the sublayer's output."""
    large = cast(PreTrainedModel, coupling.large_model)
    own = _own(coupling, visit, local)
    if not own:
        return
    with torch.enable_grad():
        output = visit.output
        if output is None:
            output = call(coupling, coupling.large, large, visit, local, visit.x, visit.arguments)
        gradients = torch.autograd.grad(output, own, error.wide().to(output.dtype))
    visit.output = None
    for tensor, gradient in zip(own, gradients, strict=True):
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
