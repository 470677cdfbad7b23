"""How much each unit of the large model matters: scores per position of each prunable axis.

Three scores, all summed over the weights that have the axis:

- ``fisher``: squared gradients of the label's log-likelihood, averaged over samples
  (Jin et al. 2023, section 2, the equation of W; Sung et al. 2021). Needs gradients.
- ``activation``: squared weight times mean squared input (Wanda, Sun et al. 2024, squared and
  summed over outputs). Forward only.
- ``magnitude``: squared weight.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plugbridge.families.spec import Layout, Place, Weight
from plugbridge.shrink.sweep import training
from plugbridge.streaming import values_of
from plugbridge.tensors.axes import reduce_to
from plugbridge.tensors.patterns import axis_names, parse

Importance = Literal["fisher", "activation", "magnitude"]
Scores = dict[str, Tensor]
LogLikelihood = Callable[[Any], Tensor]


def scope_key(layout: Layout, axis: str, place: Place) -> str | None:
    """The name under which an axis is scored at a place; None if it is not pruned there.

    ``hidden`` (one choice per model), ``heads@encoder`` (per stack), ``ffn@decoder.3`` (per layer).
    """
    scope = layout.family.scope.get(axis)
    if scope == "model":
        return axis
    if scope is None or place.stack is None:
        return None
    return f"{axis}@{place.stack}" if scope == "stack" else f"{axis}@{place.stack}.{place.layer}"


def add_scores(scores: Scores, layout: Layout, weight: Weight, values: Tensor) -> None:
    """Add one weight's element scores to every prunable axis it has; sums stay on the weight's device."""
    for axis in axis_names(weight.pattern):
        key = scope_key(layout, axis, weight.place)
        if key is not None:
            part = reduce_to(values, weight.pattern, axis, layout.sizes).double()
            scores[key] = scores[key] + part if key in scores else part


def on_cpu(sums: Scores) -> Scores:
    """Sums in memory, as stages keep them; on a card they are fetched once, not row by row."""
    return {key: value.cpu() for key, value in sums.items()}


def magnitude(model: nn.Module, layout: Layout) -> Scores:
    """Squared weights, summed per unit."""
    scores: Scores = {}
    table = layout.table()
    for name, values in values_of(model):
        add_scores(scores, layout, table[name], squared(values))
        del values  # while the next is fetched
    return on_cpu(scores)


def squared(tensor: Tensor) -> Tensor:
    """Squares in float32 or better, with no second copy on the way."""
    raised = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return raised.square() if raised is tensor else raised.square_()


def fisher(model: nn.Module, layout: Layout, samples: Iterable[Any], log_likelihood: LogLikelihood) -> Scores:
    """Diagonal Fisher information of every weight, reduced to units (Jin et al. 2023, section 2).

    One backward pass per sample: the square is of a single sample's gradient. Each weight's gradient is reduced to
    the axes' scores as soon as it is there, and dropped: neither all gradients nor an accumulator of the model's size
    are ever in memory.
    """
    scores: Scores = {}
    table = layout.table()
    parameters = dict(model.named_parameters())
    unused, count = set(parameters), 0

    def take(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        unused.discard(name)
        if gradient is not None:
            add_scores(scores, layout, table[name], squared(gradient))

    with training(parameters.values()), ExitStack() as hooks:
        for name, parameter in parameters.items():
            hooks.callback(parameter.register_post_accumulate_grad_hook(partial(take, name)).remove)
        for sample in samples:
            log_likelihood(sample).backward()  # pyright: ignore[reportUnknownMemberType]
            count += 1
    for name in unused:
        add_scores(scores, layout, table[name], torch.zeros_like(parameters[name]))
    return on_cpu({key: value / count for key, value in scores.items()})


def activation(model: nn.Module, layout: Layout, samples: Iterable[Any], forward: Callable[[Any], object]) -> Scores:
    """Wanda-like scores of the units that linear layers read, from forward passes only."""
    linear = _linear_weights(model, layout)
    scores: Scores = {}
    with record_inputs({path: model.get_submodule(path) for path in linear}) as moments:
        with torch.no_grad():
            for sample in samples:
                forward(sample)
    for name, values in values_of(model):
        path = name.removesuffix(".weight")
        if path != name and path in linear:
            weight = linear[path]
            reader, over = (0, 1) if layout.family.linear == "in out" else (1, 0)
            axes = parse(weight.pattern)[reader]
            sums = values.float().square().sum(over) * moments.mean(path)
            for axis in axes:
                key = scope_key(layout, axis, weight.place)
                if key is not None:
                    part = reduce_to(sums, f"({' '.join(axes)})", axis, layout.sizes)
                    scores[key] = scores[key] + part if key in scores else part
        del values
    return on_cpu(scores)


def _linear_weights(model: nn.Module, layout: Layout) -> dict[str, Weight]:
    """Linear layers inside the stacks by module path; embeddings and norms are none."""
    found: dict[str, Weight] = {}
    present = dict(model.named_modules())
    for weight in layout.weights():
        path = weight.name.removesuffix(".weight")
        if weight.place.stack is None or path == weight.name or len(parse(weight.pattern)) != 2:
            continue
        module = present.get(path)
        if module is not None and not isinstance(module, nn.Embedding):
            found[path] = weight
    return found


class Moments:
    """Running mean of squared activations, one vector per recorded module."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """x: (…, channels)."""
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        total = flat.square().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + flat.shape[0]

    def mean(self, name: str) -> Tensor:
        """(channels,) mean square, where the activations are."""
        return self.sums[name] / self.counts[name]


@contextmanager
def record_inputs(modules: Mapping[str, nn.Module], *, centre: bool = False) -> Generator[Moments]:
    """Record mean squared inputs of modules while the block runs.

    With `centre` the mean over channels is taken off first, as a LayerNorm does.
    """
    moments = Moments()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            moments.add(name, x - x.mean(-1, keepdim=True) if centre else x)

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class SecondMoments:
    """Sum over sublayers of trace-normalised second moments of residual vectors: (hidden, hidden) each.

    `activity` is of what the sublayers read (normalised inputs), `error` of the loss gradient at
    what they write; the error is empty unless gradients flow while the moments are recorded.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.totals: dict[str, Tensor] = {}

    def add(self, kind: str, name: str, x: Tensor) -> None:
        """x: (…, hidden)."""
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        part = (flat.mT @ flat).cpu()
        known = self.sums.setdefault((kind, name), part)
        if known is not part:
            known += part

    def finish(self, path: str) -> None:
        """Nothing more will come from a module's sublayers: only their sum stays."""
        for key in [key for key in self.sums if f"{key[1]}.".startswith(f"{path}.")]:
            self._close(key)

    def total(self, kind: str) -> Tensor | None:
        """(hidden, hidden) sum over sublayers, each of trace one; None if nothing was recorded."""
        for key in [key for key in self.sums if key[0] == kind]:
            self._close(key)
        return self.totals.get(kind)

    def _close(self, key: tuple[str, str]) -> None:
        moment = self.sums.pop(key)
        trace = moment.trace()
        if float(trace) > 0:
            moment /= trace
            known = self.totals.setdefault(key[0], moment)
            if known is not moment:
                known += moment


@contextmanager
def record_second_moments(
    model: nn.Module, layout: Layout, kinds: tuple[str, ...] = ("activity", "error")
) -> Generator[SecondMoments]:
    """Record what sublayers read and, where gradients flow, the error at what they write; or only one of them."""
    moments = SecondMoments()

    def on_error(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: moments.add("error", name, gradient)

    def on_call(name: str, context: str | None) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if "activity" in kinds:
                moments.add("activity", name, inputs[0] if inputs else keywords["hidden_states"])
                if context is not None:
                    moments.add("activity", f"{name}.{context}", keywords[context])
            written: Tensor = output[0] if isinstance(output, tuple) else output
            if "error" in kinds and written.requires_grad:
                written.register_hook(on_error(name))

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(on_call(path, context), with_kwargs=True)
        for path, context in layout.functions()
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def residual_energy(
    model: nn.Module, layout: Layout, samples: Iterable[Any], forward: Callable[[Any], object]
) -> dict[str, Tensor]:
    """Mean square of each residual channel at the input of every norm, by norm path.

    Pruning needs it to keep each norm's scale: a norm divides by the root mean square over all
    channels, and the kept channels may carry more or less than the average.
    """
    modules = {name: model.get_submodule(name) for name in layout.norms()}
    with record_inputs(modules, centre=layout.family.norm == "layernorm") as moments:
        with torch.no_grad():
            for sample in samples:
                forward(sample)
    return on_cpu({name: moments.mean(name) for name in modules})
