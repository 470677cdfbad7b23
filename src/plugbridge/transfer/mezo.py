"""MeZO: forward passes alone tune the module (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward
Passes", section 2). There is no Bridge and no graph.

The gradient of a step is the simultaneous perturbation estimate (their definition 1): with z a standard normal number
for every entry of the module at large width,

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) z

z is drawn anew from the step's seed wherever it is read, and so kept nowhere; all micro-batches of a step see the same.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from plugbridge.evaluate import mean_loss
from plugbridge.models import fuse_gelu
from plugbridge.tasks.encode import Batch, Encoded, gold
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.deferred import Deferred
from plugbridge.tuners.module import Module, attach, pack, parameter_name


def noise(tensors: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """Standard normal numbers, one for every entry of the tensors in turn; the same whenever the seed is."""
    generator: torch.Generator | None = None
    for tensor in tensors:
        if generator is None:
            generator = torch.Generator(tensor.device).manual_seed(seed)
        yield torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)


def mezo(coupling: Coupling) -> Loss:
    """The plugged large model's loss, the mean of a step's two; its gradient is the estimate from their difference.

    Losses of one step are about the same z, whatever rows they are of: torch was seeded for the step (`train.fit`).
    """
    large, layout, kind = coupling.large_model, coupling.large, coupling.encoder.kind
    assert large is not None
    wrapped, _ = attach(large, coupling.method, layout, coupling.settings)
    fuse_gelu(large)
    wrapped.requires_grad_(False)
    wrapped.eval()
    spared = {} if coupling.method.stacked else {"use_cache": False}

    @torch.no_grad()
    def loss_of(module: Module, batch: Batch) -> Tensor:
        replaced = {parameter_name(key): tensor for key, tensor in pack(coupling.method, layout, module).items()}

        def forward(**inputs: Any) -> Any:
            return functional_call(wrapped, replaced, (), {**inputs, **spared})

        return mean_loss(forward, batch, kind)

    def loss(rows: list[Encoded]) -> Tensor:
        wide, seed, eps = coupling.at_large_width(), torch.initial_seed(), coupling.perturbation
        trained = {slot: tensor for slot, tensor in wide.items() if coupling.trains(slot)}
        batch = gold(coupling.encoder, rows).to(large.device)

        def moved_by(step: float) -> Module:
            changes = zip(trained.items(), noise(trained.values(), seed), strict=True)
            return {**wide, **{slot: tensor.detach() + step * z for (slot, tensor), z in changes}}

        above, below = (loss_of(moved_by(step), batch) for step in (eps, -eps))
        slope = (above - below) / (2 * eps)

        def backward(factor: Tensor) -> list[Tensor | None]:
            return [(factor * slope).to(z.dtype) * z for z in noise(trained.values(), seed)]

        return cast(Tensor, Deferred.apply((above + below) / 2, backward, *trained.values()))

    return loss
