"""A module's tensors: their names on disk and in memory, their axes, one entry per layer.

On disk a module is a peft checkpoint; in memory a `Module` maps a `Slot` (stack, layer, site,
tensor) to a tensor with named axes, whatever the method. Only this file knows how peft spells names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout
from plugbridge.parsing import shown
from plugbridge.sources import commit_of
from plugbridge.tuners.table import Method, MethodSettings

WEIGHTS = "adapter_model.safetensors"
_PREFIX_KEY = "prompt_embeddings"
_PREFIX_PARAMETER = "prompt_encoder.default.embedding.weight"
_HEAD = "base_model.model."


@dataclass(frozen=True, order=True)
class Slot:
    """Where a module tensor sits. `site` is the module path inside the block, "" for prefixes."""

    stack: str
    layer: int
    site: str
    tensor: str


Module = dict[Slot, Tensor]


def saved_key(parameter: str) -> str:
    """Name in a peft checkpoint of a trainable parameter of a peft model."""
    return _PREFIX_KEY if parameter == _PREFIX_PARAMETER else parameter.replace(".default.", ".")


def parameter_name(key: str) -> str:
    """Name in a peft model of a checkpoint's tensor (adapter name ``default``)."""
    if key == _PREFIX_KEY:
        return _PREFIX_PARAMETER
    head, _, leaf = key.rpartition(".")
    return f"{head}.default.{leaf}"


def pattern_of(method: Method, layout: Layout, slot: Slot) -> str:
    """Axes of the tensor in a slot; for a stacked method, of one layer's part."""
    pattern = method.tensors[slot.tensor]
    if method.stacked:
        kv = layout.family.prefix.axes
        return pattern.replace("layers ", "").replace("{kv}", kv)
    path = f"{layout.family.stack[slot.stack].path.format(slot.layer)}.{slot.site}"
    axes_in, axes_out = layout.linear_axes(path)
    return pattern.replace("{in}", axes_in).replace("{out}", axes_out)


def unpack(method: Method, layout: Layout, state: Mapping[str, Tensor]) -> Module:
    """Checkpoint tensors (by their key on disk) to slots. Raises ModelError for an unknown key."""
    module: Module = {}
    for key, tensor in state.items():
        name = next((n for n in method.tensors if key == n or key.endswith(f".{n}")), None)
        if name is None:
            raise ModelError(f"tensor {shown(key)} is not part of a {method.title} checkpoint")
        if method.stacked:
            stack, parts = layout.family.prefix.stack, layout.family.prefix.parts
            layers = layout.layers[stack]
            if tensor.shape[1] % (layers * parts):
                raise ModelError(f"{shown(key)} of width {tensor.shape[1]} does not hold {layers} layers")
            for layer, part in enumerate(tensor.chunk(layers * parts, dim=1)[::parts]):
                module[Slot(stack, layer, "", name)] = part
            continue
        path = key.removeprefix(_HEAD).removesuffix(f".{name}")
        place, site = layout.place_of(path)
        assert place.stack is not None
        assert place.layer is not None
        module[Slot(place.stack, place.layer, site, name)] = tensor
    return module


def pack(method: Method, layout: Layout, module: Mapping[Slot, Tensor]) -> dict[str, Tensor]:
    """Slots to checkpoint tensors; the inverse of `unpack`, with zeros where nothing is read. Differentiable."""
    if method.stacked:
        state: dict[str, Tensor] = {}
        for name in method.tensors:
            read = [module[slot] for slot in sorted(module) if slot.tensor == name]
            unread = [torch.zeros_like(read[0])] * (layout.family.prefix.parts - 1)
            state[name] = torch.cat([part for tensor in read for part in (tensor, *unread)], dim=1)
        return state
    return {
        f"{_HEAD}{layout.family.stack[s.stack].path.format(s.layer)}.{s.site}.{s.tensor}": t for s, t in module.items()
    }


def attach(model: nn.Module, method: Method, layout: Layout, settings: MethodSettings) -> tuple[PeftModel, PeftConfig]:
    """Put a fresh module of this method on a model (in place, as peft does)."""
    config = method.configure(layout, method.roles, settings)
    if not any(isinstance(part, Conv1D) for part in model.modules()):  # packed: peft would warn of what it mends itself
        cast(Any, config).fan_in_fan_out = False
    peft_model = get_peft_model(cast(Any, model), config)
    return cast(PeftModel, peft_model), config


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a peft model that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The module on a peft model as checkpoint tensors (detached, on CPU)."""
    return {saved_key(n): p.detach().cpu().contiguous().clone() for n, p in trainable(model).items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the module on a peft model from checkpoint tensors. Raises ModelError on a mismatch."""
    parameters = trainable(model)
    wanted = {saved_key(name): p for name, p in parameters.items()}
    if set(wanted) != set(state):
        odd = sorted(set(wanted) ^ set(state))[0]
        raise ModelError(f"the checkpoint and the model differ in tensor {shown(odd)}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(state[key])


def save(folder: Path, config: PeftConfig, state: Mapping[str, Tensor], base: str | None) -> None:
    """Write a standard peft checkpoint: `adapter_config.json` and `adapter_model.safetensors`.

    Of a base from the hub it names the commit, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = base
    config.revision = None if base is None else commit_of(base)
    config.inference_mode = True
    if config.peft_type == "PREFIX_TUNING" and getattr(config, "num_transformer_submodules", None) is None:
        submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
        cast(Any, config).num_transformer_submodules = submodules
    config.save_pretrained(str(folder))
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """Tensors of a peft checkpoint. Raises ModelError if there is none."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{folder} holds no module: {WEIGHTS} is missing")
    return load_file(str(path))
