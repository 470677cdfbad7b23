"""Every method on every family: a no-op at start, exact round trips, axes that match its tensors."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model

from conftest import FAMILIES, METHODS, logits_of, make_model, randomise
from plugbridge.errors import ConfigError, ModelError
from plugbridge.models import layout_for
from plugbridge.tensors.patterns import infer_sizes
from plugbridge.tuners.bottleneck import METHOD, BottleneckConfig, BottleneckModel
from plugbridge.tuners.module import (
    attach,
    load_state,
    pack,
    parameter_name,
    pattern_of,
    read,
    save,
    saved_key,
    state_of,
    trainable,
    unpack,
)
from plugbridge.tuners.register import extend_peft
from plugbridge.tuners.table import METHODS as TABLE
from plugbridge.tuners.table import MethodSettings, describe, find_method

SETTINGS = MethodSettings(rank=3, alpha=6.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_fresh_module_changes_nothing(family: str, method: str) -> None:
    model = make_model(family)
    before = logits_of(model)
    wrapped, _ = attach(model, TABLE[method], layout_for(model), SETTINGS)
    assert torch.equal(logits_of(wrapped.eval()), before)


def test_a_zero_prefix_only_dilutes_attention() -> None:
    """A prefix cannot be a no-op: its keys take softmax mass. Zero keys and values take exactly n/(n+Z)."""
    q, k, v = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    plain = torch.softmax(q @ k.T, -1) @ v
    diluted = torch.softmax(q @ torch.cat([zeros, k]).T, -1) @ torch.cat([zeros, v])
    mass = (q @ k.T).exp().sum(-1, keepdim=True)
    assert torch.allclose(diluted, plain * mass / (mass + 3), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_axes_fit_the_tensors_and_slots_round_trip(family: str, method: str) -> None:
    model = make_model(family, layers=3)
    layout = layout_for(model)
    row = TABLE[method]
    wrapped, _ = attach(model, row, layout, SETTINGS)
    randomise(wrapped)
    state = state_of(wrapped)
    module = unpack(row, layout, state)
    sizes = {**layout.sizes, "kv": 2}
    for slot, tensor in module.items():
        found = infer_sizes(pattern_of(row, layout, slot), tuple(tensor.shape), sizes)
        own = {"rank", "bottleneck", "tokens"} & set(found)
        assert all(found[axis] == 3 for axis in own)
    packed = pack(row, layout, module)
    assert packed.keys() == state.keys()
    assert all(torch.equal(again, module[slot]) for slot, again in unpack(row, layout, packed).items())
    before = logits_of(wrapped.eval())
    load_state(wrapped, packed)
    assert torch.equal(logits_of(wrapped), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_reads_its_own_prefix(family: str) -> None:
    model = make_model(family, layers=4)
    layout = layout_for(model)
    row = TABLE["prefix"]
    wrapped, _ = attach(model, row, layout, SETTINGS)
    randomise(wrapped)
    wrapped.eval()
    module = unpack(row, layout, state_of(wrapped))
    assert len(module) == 4
    before = logits_of(wrapped)
    for slot in module:
        changed = {**module, slot: module[slot] + 1}
        load_state(wrapped, pack(row, layout, changed))
        assert not torch.allclose(logits_of(wrapped), before), slot


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_round_trip(family: str, method: str, tmp_path: Path) -> None:
    row = TABLE[method]
    model = make_model(family)
    layout = layout_for(model)
    wrapped, config = attach(model, row, layout, SETTINGS)
    randomise(wrapped)
    wanted = logits_of(wrapped.eval())
    save(tmp_path, config, state_of(wrapped), None)
    ours, _ = attach(make_model(family), row, layout, SETTINGS)
    load_state(ours, read(tmp_path))
    assert torch.equal(logits_of(ours.eval()), wanted)
    theirs = PeftModel.from_pretrained(make_model(family), str(tmp_path), adapter_name="other")
    assert torch.allclose(logits_of(theirs.eval()), wanted, rtol=0, atol=1e-6)


def test_names_on_disk_and_in_memory() -> None:
    for parameter in (
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight",
        "prompt_encoder.default.embedding.weight",
    ):
        assert parameter_name(saved_key(parameter)) == parameter


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE["lora"], layout, SETTINGS)
    state = state_of(wrapped)
    with pytest.raises(ModelError, match="not part of a LoRA checkpoint"):
        unpack(TABLE["lora"], layout, {"base_model.model.lm_head.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="does not hold 2 layers"):
        unpack(TABLE["prefix"], layout, {"prompt_embeddings": torch.zeros(3, 7)})
    state.pop(next(iter(state)))
    with pytest.raises(ModelError, match="differ in tensor"):
        load_state(wrapped, state)
    with pytest.raises(ModelError, match="holds no module"):
        read(tmp_path)


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match="known: lora, adapter, prefix"):
        find_method("ladder")


def test_rows_describe_themselves() -> None:
    for method in TABLE.values():
        row = describe(method)
        assert row["name"] == method.name
        assert row["library"] in ("peft", "plugbridge")
        assert row["source"]


def test_registering_twice_changes_nothing() -> None:
    before = list(PeftType)
    assert extend_peft(METHOD, BottleneckConfig, BottleneckModel, prefix="adapter_") is PeftType[METHOD.upper()]
    assert list(PeftType) == before


def test_adapter_stands_behind_its_layer_and_adds_the_bottleneck_by_hand() -> None:
    model = make_model("gpt2").double()
    wrapped, _ = attach(model, TABLE["adapter"], layout_for(model), SETTINGS)
    randomise(wrapped)
    layer = wrapped.base_model.model.transformer.h[0].mlp.c_proj
    x = torch.randn(2, 64, dtype=torch.float64)
    y = layer.base_layer(x)
    down, up = layer.adapter_down["default"], layer.adapter_up["default"]
    down.double(), up.double()
    inner = torch.nn.functional.gelu(y @ down.weight.T + down.bias, approximate="tanh")
    assert torch.allclose(layer(x), y + inner @ up.weight.T + up.bias, atol=1e-12)
    with wrapped.disable_adapter():
        assert torch.equal(layer(x), y)


def test_adapter_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        get_peft_model(make_model("gpt2"), BottleneckConfig(bottleneck=0, target_modules=["c_proj"]))
    with pytest.raises(TypeError, match="follows a linear layer"):
        get_peft_model(make_model("gpt2"), BottleneckConfig(target_modules=["ln_1"]))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_module_trains(method: str) -> None:
    model = make_model("t5")
    wrapped, _ = attach(model, TABLE[method], layout_for(model), SETTINGS)
    names = trainable(wrapped)
    assert names
    assert all("lora_" in n or "adapter_" in n or "prompt_encoder" in n for n in names)
