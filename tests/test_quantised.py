"""Loading in 8 and 4 bits: what should be quantised is, the rest is not, and what cannot be is refused."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import FAMILIES, logits_of, make_model, save_model, second_peak
from plugbridge.config import LoadIn
from plugbridge.errors import ModelError
from plugbridge.models import find_checkpoint, layout_for, load_model, parameter_count
from plugbridge.quantised import LAYER, block_linears, check_quantised, load_quantised

bnb: Any = pytest.importorskip("bitsandbytes")
BITS: tuple[LoadIn, ...] = ("8bit", "4bit")


def save_wide(family: str, folder: Path) -> str:
    """A model whose linear layers all read multiples of 64 channels, as 4 bits on the CPU want it."""
    return str(save_model(family, folder, hidden=64, layers=2, heads=16, seed=3))


def load(source: str, load_in: LoadIn, dtype: torch.dtype = torch.float32):
    return load_quantised(source, load_in, dtype=dtype, device="cpu", checkpoint=find_checkpoint(source))


def weight_of(layer: Any) -> torch.Tensor:
    """A quantised layer's weight as numbers, (out, in); before its first forward pass."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data * layer.weight.SCB[:, None] / 127


@pytest.mark.parametrize("load_in", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(
    family: str, load_in: LoadIn, tmp_path: Path
) -> None:
    source = save_wide(family, tmp_path)
    whole = load_model(source)
    model, layout = load(source, load_in)
    assert layout == layout_for(whole)
    linear = {path for path, m in whole.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    kept = {path for path in linear if path == "lm_head" or (family.startswith("t5") and path.endswith(".wo"))}
    found = {path for path, m in model.named_modules() if isinstance(m, getattr(bnb.nn, LAYER[load_in]))}
    assert found == linear - kept == set(block_linears(whole, layout))
    assert not any(p.requires_grad for p in model.parameters())
    for path in found:
        exact = whole.get_parameter(f"{path}.weight").detach()
        exact = exact.mT if family == "gpt2" else exact
        error = (weight_of(model.get_submodule(path)) - exact).norm() / exact.norm()
        assert 0 < float(error) < {"8bit": 0.01, "4bit": 0.11}[load_in], path
    quantised = {f"{path}.weight" for path in found}
    for name, parameter in whole.named_parameters():
        assert name in quantised or torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_are_the_model_with_rounded_weights(family: str, tmp_path: Path) -> None:
    source = save_wide(family, tmp_path)
    rounded, (model, layout) = load_model(source), load(source, "4bit")
    with torch.no_grad():
        for path in block_linears(rounded, layout):
            weight = weight_of(model.get_submodule(path))
            rounded.get_parameter(f"{path}.weight").copy_(weight.mT if family == "gpt2" else weight)
    assert torch.allclose(logits_of(model), logits_of(rounded), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_near_the_model(family: str, tmp_path: Path) -> None:
    source = str(save_model(family, tmp_path))
    exact = logits_of(load_model(source))
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load(source, "8bit", dtype)
        found = logits_of(model)
        assert (model.dtype, found.dtype) == (dtype, dtype)
        assert float((found.float() - exact).norm() / exact.norm()) < 0.1


def test_widths_that_the_cpu_gets_wrong_in_four_bits_are_refused(tmp_path: Path) -> None:
    source = str(save_model("gpt2", tmp_path))
    with pytest.raises(ModelError, match=r"h\.0\.attn\.c_attn' of .* reads 16 channels.*multiple of 64; use load_in"):
        load(source, "4bit")


@pytest.mark.parametrize("load_in", BITS)
def test_a_model_that_was_not_quantised_is_refused(load_in: LoadIn, tmp_path: Path) -> None:
    model = load_model(save_wide("llama", tmp_path))
    expected = block_linears(model, layout_for(model))
    with pytest.raises(ModelError, match=f"14 of the 14 linear layers of it .* {load_in}, the first is 'model.layers"):
        check_quantised("it", model, expected, load_in)
    with pytest.raises(ModelError, match="0 of the 0 linear layers"):
        check_quantised("it", model, [], load_in)
    quantised, _ = load(str(tmp_path), load_in)
    check_quantised("it", quantised, expected, load_in)
    quantised.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(64, 128))
    with pytest.raises(ModelError, match=r"1 of the 14 .* the first is 'model\.layers\.1\.mlp\.up_proj'"):
        check_quantised("it", quantised, expected, load_in)


def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_wide("gpt2", tmp_path)

    def missing() -> Any:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr("plugbridge.quantised.bring_back_bitsandbytes", missing)
    with pytest.raises(ModelError, match=r"'8bit', but bitsandbytes cannot be .*pip install 'plugbridge\[quantised\]'"):
        load(source, "8bit")


@pytest.mark.parametrize("load_in", BITS)
def test_a_device_that_cannot_is_refused(load_in: LoadIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this device\nmore")

    source = save_wide("gpt2", tmp_path)
    monkeypatch.setattr(getattr(bnb.nn, LAYER[load_in]), "forward", broken)
    with pytest.raises(
        ModelError, match=rf"cannot run {load_in} layers on device 'cpu': no kernel for this device more; "
    ):
        load(source, load_in)


@pytest.mark.parametrize("load_in", BITS)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_model_read_tensor_by_tensor_is_the_one_that_transformers_loads(
    family: str, load_in: LoadIn, tmp_path: Path
) -> None:
    source = save_wide(family, tmp_path)
    model, layout = load(source, load_in)
    wanted, same = load_quantised(source, load_in, dtype=torch.float32, device="cpu")
    assert layout == same
    assert model.name_or_path == wanted.name_or_path == source
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    own = model.state_dict()
    assert own.keys() == wanted.state_dict().keys()
    for name, values in wanted.state_dict().items():
        assert own[name].dtype == values.dtype
        assert torch.equal(own[name], values), name
    assert torch.equal(logits_of(model), logits_of(wanted))


def test_files_of_a_kind_that_is_not_read_here_are_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_wide("gpt2", tmp_path)
    monkeypatch.setattr("plugbridge.quantised.DTYPES", {})
    monkeypatch.setattr("plugbridge.quantised._read", None)
    assert load(source, "8bit")[0].name_or_path == source


@pytest.mark.skipif(sys.platform != "linux", reason="only there peaks can be reset")
def test_the_full_weights_are_never_there_as_a_whole(clean: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("gpt2", hidden=512, layers=6, heads=8)
    model.save_pretrained(tmp_path)
    whole = 4 * parameter_count(model)
    assert whole / 4 < clean(partial(second_peak, partial(load, str(tmp_path), "8bit"))) < 0.7 * whole
