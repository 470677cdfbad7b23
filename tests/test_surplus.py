"""Checkpoints that hold more than their config.json says, or quantised weights without their scales."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import FAMILIES, save_model
from plugbridge.config import parse_config
from plugbridge.errors import ModelError
from plugbridge.models import find_checkpoint, load_model
from plugbridge.prepare import prepare
from plugbridge.quantised import load_quantised
from plugbridge.streaming import load_converted, load_streamed

LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")
BUFFERS = {
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "t5": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
}
FIRST = {
    "gpt2": "transformer.h.2.",
    "t5": "decoder.block.2.",
    "t5-gated": "decoder.block.2.",
    "llama": "model.layers.2.",
}


def _config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw.update({key: value for key, value in changes.items() if key in raw or key not in LAYERS})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def _weights(folder: Path, change: Callable[[dict[str, Tensor]], None], pickled: bool = False) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_the_configuration_does_not_have_are_refused(family: str, pickled: bool, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path, layers=3)
    _config(folder, **dict.fromkeys(LAYERS, 2))
    _weights(folder, lambda _tensors: None, pickled)
    said = rf"holds \d+ tensors for which its config.json has no place, the first is '{FIRST[family]}"
    for device in ("cpu", "meta"):
        with pytest.raises(ModelError, match=said):
            load_model(str(folder), device=device)
    checkpoint = find_checkpoint(str(folder))
    assert (checkpoint is None) == pickled
    if checkpoint is not None:
        with pytest.raises(ModelError, match=said):
            load_streamed(str(folder), checkpoint)
        with pytest.raises(ModelError, match=said):
            load_converted(str(folder), checkpoint, dtype=torch.bfloat16)
        with pytest.raises(ModelError, match=said):
            load_quantised(str(folder), "8bit", dtype=torch.float32, device="cpu", checkpoint=checkpoint)


def test_one_tensor_too_many_is_refused_and_what_older_versions_stored_is_not(tmp_path: Path) -> None:
    for family, names in BUFFERS.items():
        folder = save_model(family, tmp_path / family)
        _weights(folder, lambda tensors, names=names: tensors.update({name: torch.zeros(1) for name in names}))
        load_model(str(folder))
        _weights(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 16)}))
        with pytest.raises(ModelError, match=r"holds 1 tensors .* the first is 'score.weight'; is it the checkpoint's"):
            load_model(str(folder))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_lost_their_scales_are_refused(
    kind: torch.dtype, pickled: bool, run_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = save_model("gpt2", tmp_path / "large", hidden=16, layers=3, heads=4, seed=2)
    mask = "transformer.h.0.attn.bias"
    _weights(folder, lambda tensors: tensors.update({mask: torch.ones(1, 1, 8, 8, dtype=torch.bool)}), pickled)
    prepare(parse_config(run_config(large=str(folder)), "test"), None)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    save_model("gpt2", folder, hidden=16, layers=3, heads=4, seed=2)
    _weights(folder, lambda t: t.update({"transformer.h.1.mlp.c_fc.weight": (20 * t["transformer.h.1.mlp.c_fc.weight"]).to(kind)}), pickled)  # fmt: skip  # noqa: E501
    for path in ("small", "large"):
        raw = run_config(**{path: str(folder)})
        with pytest.raises(ModelError, match=r"'transformer.h.1.mlp.c_fc.weight' of .*large is of type .*expected F32"):
            prepare(parse_config(raw, "test"), None)


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    _config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    for device in ("cpu", "meta"):
        with pytest.raises(ModelError, match=r"are quantised already, as config.json says; expected full weights"):
            load_model(str(folder), device=device)
