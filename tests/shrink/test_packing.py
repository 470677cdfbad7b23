"""Packed models: all matrices of the blocks and nothing else, real bytes, loading by themselves."""

from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import FAMILIES, logits_of, make_model, make_tokenizer, pack_model
from plugbridge.errors import ModelError
from plugbridge.models import layout_for, load_model
from plugbridge.shrink.bridge import empty_bridge, write_bridge
from plugbridge.shrink.importance import magnitude
from plugbridge.shrink.packing import (
    Order,
    PackedLinear,
    bytes_of,
    load_bridge,
    make_packed,
    matrices_of,
    packed_weights,
)
from plugbridge.shrink.prune import plan_bridge
from plugbridge.tensors.packed import Bits, pack
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import METHODS, MethodSettings


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_of_the_blocks_are_rounded_and_nothing_else(family: str) -> None:
    model, packed = make_model(family), make_model(family)
    layout = layout_for(model)
    pack_model(packed, layout, 2)
    paths = matrices_of(model, layout)
    blocks = {f"{path}.weight" for path in paths}
    inside = {name for name, weight in layout.table().items() if weight.place.stack is not None}
    left = [name for name, tensor in model.state_dict().items() if name in inside - blocks and tensor.dim() > 1]
    assert all("relative_attention_bias" in name for name in left)
    for name, tensor in model.state_dict().items():
        if name not in blocks:
            assert torch.equal(packed.state_dict()[name], tensor), name
    plain = make_model(family)
    for path in paths:
        layer = plain.get_submodule(path)
        weight = layer.get_parameter("weight")
        stored = weight if layout.family.linear == "out in" else weight.mT
        rounded = pack(stored.contiguous(), 2).unpack()
        weight.data.copy_(rounded if layout.family.linear == "out in" else rounded.mT)
        assert not torch.equal(weight, model.get_submodule(path).get_parameter("weight"))
    assert torch.allclose(logits_of(packed), logits_of(plain), atol=1e-4)
    assert not torch.allclose(logits_of(packed), logits_of(model), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_loads_by_itself_and_holds_the_bits_it_says(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    layout = layout_for(model)
    plan = plan_bridge(layout, magnitude(model, layout), layout.sizes)
    bridge = empty_bridge(model, layout, plan)
    paths = matrices_of(bridge, layout)
    make_packed(bridge, paths, 3, "out in")
    turned = layout.family.linear == "in out"
    write_bridge(bridge, packed_weights(model.named_parameters(), paths, 3, turned), tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if layout.family.kind == "seq2seq" else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path)
    pack_model(model, layout, 3)
    assert torch.equal(logits_of(loaded.eval()), logits_of(model))
    again = load_bridge(tmp_path)
    layer = cast(PackedLinear, again.get_submodule(paths[0]))
    assert (layer.weight.dtype, layer.bits) == (torch.int8, 3)
    layers = [cast(PackedLinear, again.get_submodule(path)) for path in paths]
    packed = sum(layer.weight.nbytes for layer in layers)
    assert packed == sum(layer.shape[0] * -(-layer.shape[1] // 64) * 64 * 3 // 8 for layer in layers)
    assert bytes_of(again, layout, True) > bytes_of(again, layout, False) > packed
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_bridge(tmp_path / "again")), logits_of(loaded))
    with pytest.raises(ModelError, match="quantised already"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("order", ["in out", "out in"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_products_are_those_of_the_unpacked_matrix(bits: Bits, order: Order) -> None:
    layer = PackedLinear(6, 10, bits, order, torch.nn.Parameter(torch.randn(10)), "cpu")
    layer.fill(pack(torch.randn(layer.shape), bits))
    matrix = layer.dense(torch.float32)
    x = torch.randn(2, 3, 6, requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, x @ matrix + layer.bias, atol=1e-6)
    error = torch.randn(2, 3, 10)
    (found,) = torch.autograd.grad(out, x, error)
    assert torch.allclose(found, error @ matrix.mT, atol=1e-6)
    moved = layer.to(torch.bfloat16)
    assert moved.weight.dtype == moved.scales.dtype == torch.int8


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_module_is_attached_to_it_without_a_warning(family: str, method: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    before = logits_of(model)
    pack_model(model, layout, 8)
    wrapped, _ = attach(model, METHODS[method], layout, MethodSettings(rank=2, alpha=4.0))
    assert torch.allclose(logits_of(wrapped.eval()), before, atol=0.2)
