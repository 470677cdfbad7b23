"""The Bridge: the large model pruned as a plan says, weight by weight, in memory or straight to disk."""

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout, config_changes
from plugbridge.parsing import shown
from plugbridge.shrink.prune import BridgePlan
from plugbridge.streaming import values_of
from plugbridge.tensors.axes import transform
from plugbridge.tensors.writer import write_tensors

Weights = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def bridge_weights(
    model: PreTrainedModel, layout: Layout, plan: BridgePlan, energy: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The Bridge's weights by name, one after another, in the model's order; tied ones once.

    Each norm's weight is multiplied by the ratio of the kept channels' root mean square to that of all channels
    (`energy`, see `residual_energy`), so that pruning channels that are always zero changes nothing. The model may be
    streamed: one of its weights is in memory, and the next one is read ahead.
    """
    factors = {f"{norm}.weight": _norm_ratio(values, plan.keep["hidden"]) for norm, values in energy.items()}
    scale = layout.family.logit_scale
    if scale is not None and bool(getattr(model.config, scale.flag, False)):
        change = layout.sizes[scale.axis] / plan.sizes[scale.axis]
        factors[scale.weight] = factors.get(scale.weight, 1.0) * change**scale.power
    table = layout.table()
    for name, values in values_of(model):
        weight = table[name]
        ops = plan.ops(layout, weight.pattern, weight.place)
        pruned = transform(values, weight.pattern, ops, layout.sizes, name)
        del values
        yield name, pruned * factors[name] if name in factors else pruned


def _norm_ratio(energy: Tensor, kept: Tensor) -> float:
    whole = energy.mean()
    return 1.0 if whole == 0 else float((energy[kept].mean() / whole).sqrt())


def bridge_config(config: PreTrainedConfig, layout: Layout, plan: BridgePlan) -> PreTrainedConfig:
    """The Bridge's configuration. The norm's epsilon grows with the width that is taken away."""
    changed = copy.deepcopy(config)
    for attribute, value in config_changes(layout.family, plan.sizes).items():
        if getattr(changed, attribute, None) is not None or plan.sizes != layout.sizes:
            setattr(changed, attribute, value)
    eps = layout.family.norm_eps
    width = layout.sizes["hidden"] / plan.sizes["hidden"]
    setattr(changed, eps, getattr(config, eps) * width)
    return changed


def empty_bridge(model: PreTrainedModel, layout: Layout, plan: BridgePlan, device: str = "meta") -> PreTrainedModel:
    """The Bridge's class and configuration, its weights not yet filled; on the meta device they take no memory."""
    with _default_dtype(model.dtype), torch.device(device):
        bridge = type(model)(bridge_config(model.config, layout, plan))
    bridge.generation_config = copy.deepcopy(model.generation_config)
    return bridge.eval()


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, layout: Layout, plan: BridgePlan, energy: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The Bridge as a model of the same class and dtype, in evaluation mode.

    Its tensors are made once and filled one by one, so that it takes no more than itself and two weights of the large
    model, which may be streamed.
    """
    bridge = empty_bridge(model, layout, plan, str(model.device))
    bare = dict(bridge.named_parameters())
    for name, pruned in _fitting(bridge, bridge_weights(model, layout, plan, energy)):
        bare[name].copy_(pruned)
    return bridge


def write_bridge(bridge: PreTrainedModel, weights: Weights, folder: Path) -> None:
    """The Bridge as a Hugging Face directory, never whole in memory.

    `bridge` is an empty one, `weights` are those that belong in it, each let go of before the next is asked for.
    """
    config = copy.deepcopy(bridge.config)
    config.architectures = [type(bridge).__name__]
    config.dtype = str(bridge.dtype).removeprefix("torch.")
    config.save_pretrained(str(folder))
    if bridge.can_generate():
        bridge.generation_config.save_pretrained(str(folder))
    shapes = {name: (tuple(bare.shape), bare.dtype) for name, bare in bridge.named_parameters()}
    write_tensors(folder / "model.safetensors", shapes, _fitting(bridge, weights))


def _fitting(bridge: PreTrainedModel, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Weights, of which each fits into a Bridge's place of its name and none is missing. Raises ModelError."""
    left = dict(bridge.named_parameters())
    for name, pruned in weights:
        bare = left.pop(name)
        if bare.shape != pruned.shape:
            raise ModelError(f"{shown(name)} has shape {tuple(pruned.shape)} in the Bridge, not {tuple(bare.shape)}")
        yield name, pruned.to(bare.dtype)
    if left:
        raise ModelError(f"the Bridge's '{next(iter(left))}' has no counterpart in the large model")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    """New tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shuffled(weights: Weights, layout: Layout, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A control: the entries of every weight inside the blocks permuted.

    Each keeps its values' distribution and loses what it has learned.
    """
    generator = torch.Generator().manual_seed(seed)
    table = layout.table()
    for name, tensor in weights:
        if table[name].place.stack is None:
            yield name, tensor
        else:
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            yield name, tensor.flatten()[order].reshape(tensor.shape)
