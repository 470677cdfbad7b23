"""The large model with 8-bit or 4-bit weights, for where it only runs forward; through bitsandbytes.

8 bits are LLM.int8() (Dettmers et al. 2022), 4 bits NF4 (Dettmers et al. 2023). What is quantised are the
linear layers of the blocks, but for those that the model's own code keeps in full precision (T5's `wo`).
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plugbridge.config import LoadIn
from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout
from plugbridge.imports import bring_back_bitsandbytes
from plugbridge.models import layout_for, load_model, reason_of
from plugbridge.parsing import shown
from plugbridge.tensors.checkpoint import DTYPES, Checkpoint

LAYER = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}
BLOCK = 64
"""Weights that share one scale in 4 bits."""


def load_quantised(
    source: str,
    load_in: LoadIn,
    *,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[PreTrainedModel, Layout]:
    """A model whose blocks hold quantised weights, frozen, and the layout it would have in full precision.

    `dtype` is that of everything else: norms, embeddings, head, and what flows between layers. On the CPU tensors are
    read from the `checkpoint`, where there is one, each when it is quantised: files that are mapped would all be in
    memory, too. Raises ModelError as `load_model` does, for what `check_load_in` refuses, and for a layer left
    unquantised.
    """
    whole = load_model(source, device="meta", trust_remote_code=trust_remote_code)
    layout = layout_for(whole)
    check_load_in(source, whole, layout, load_in, device)
    settings = _settings(load_in, dtype)
    if device == "cpu" and checkpoint is not None and all(e.dtype in DTYPES for e in checkpoint.entries.values()):
        model = _read(source, whole, checkpoint, dtype, settings)
    else:
        model = load_model(
            source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantisation=settings
        )
    check_quantised(source, model, block_linears(whole, layout), load_in)
    _keep_differentiable(model)
    return model.requires_grad_(False), layout


class _OnDisk:
    """A tensor of a checkpoint as transformers takes a slice of a file: read when it is indexed."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self.shape = torch.Size(checkpoint.entries[name].shape)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._checkpoint.read(self._name)[index]


def _read(
    source: str, whole: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, settings: BitsAndBytesConfig
) -> PreTrainedModel:
    """The model that `whole` has the names and shapes of, quantised as its tensors are read."""
    try:
        model: Any = type(whole).from_pretrained(
            None,
            config=copy.deepcopy(whole.config),
            state_dict=cast(Any, {name: _OnDisk(checkpoint, name) for name in checkpoint.entries}),
            dtype=dtype,
            device_map={"": "cpu"},
            quantization_config=settings,
        )
    except Exception as error:
        raise ModelError(f"cannot load the model in {source}: {reason_of(error)}") from error
    model.name_or_path = model.config.name_or_path = whole.name_or_path
    model.generation_config = whole.generation_config
    return cast(PreTrainedModel, model.eval())


def block_linears(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Paths of the linear layers inside the blocks that can be quantised."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    table = layout.table()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and table[f"{path}.weight"].place.stack is not None
        and not kept & set(path.split("."))
    ]


def check_load_in(source: str, whole: PreTrainedModel, layout: Layout, load_in: LoadIn, device: str) -> None:
    """Refuse what cannot be loaded in so many bits, from a model's shapes alone. Raises ModelError."""
    try:
        library = bring_back_bitsandbytes()
    except ImportError as error:
        raise ModelError(
            f"large.load_in is '{load_in}', but bitsandbytes cannot be imported ({reason_of(error)}); "
            "pip install 'plugbridge[quantised]', or leave load_in out"
        ) from error
    try:
        _try_layer(library, load_in, device)
    except Exception as error:
        raise ModelError(
            f"bitsandbytes {library.__version__} cannot run {load_in} layers on device '{device}': "
            f"{reason_of(error)}; use another device or load_in"
        ) from error
    check_blocks(source, whole, layout, load_in, device)


def check_blocks(source: str, whole: PreTrainedModel, layout: Layout, load_in: LoadIn, device: str) -> None:
    """Refuse layers of which the device's code does not know the blocks. Raises ModelError."""
    for path in block_linears(whole, layout) if (load_in, device) == ("4bit", "cpu") else ():
        shape = whole.get_parameter(f"{path}.weight").shape
        inputs = shape[0] if layout.family.linear == "in out" else shape[1]
        # bitsandbytes' CPU code starts a new block of 64 at every row, which its quantisation does not
        if inputs % BLOCK:
            raise ModelError(
                f"layer {shown(path)} of {source} reads {inputs} channels, but 4 bits on the CPU need a multiple of "
                f"{BLOCK}; use load_in: 8bit"
            )


def check_quantised(source: str, model: nn.Module, expected: list[str], load_in: LoadIn) -> None:
    """Refuse a model of which a layer that should be quantised is not. Raises ModelError."""
    kind = getattr(bring_back_bitsandbytes().nn, LAYER[load_in])
    plain = [
        path
        for path in expected
        if not isinstance(layer := model.get_submodule(path), kind) or layer.weight.dtype.is_floating_point
    ]
    if plain or not expected:
        first = f", the first is {shown(plain[0])}" if plain else ""
        raise ModelError(
            f"{len(plain)} of the {len(expected)} linear layers of {source} were not loaded in {load_in}{first}; "
            "is the checkpoint quantised in another way? Leave load_in out"
        )


def _settings(load_in: LoadIn, dtype: torch.dtype) -> BitsAndBytesConfig:
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _try_layer(library: Any, load_in: LoadIn, device: str) -> None:
    """One layer forward and backward."""
    options: dict[str, Any] = {"has_fp16_weights": False} if load_in == "8bit" else {"quant_type": "nf4"}
    layer = getattr(library.nn, LAYER[load_in])(BLOCK, BLOCK, bias=False, **options).to(device).eval()
    layer(torch.ones(1, BLOCK, device=device, requires_grad=True)).sum().backward()


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from packing 4-bit weights for a CPU kernel that has no backward pass.

    It would do so in the first forward pass without gradients, on CPUs with AVX512-BF16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
