"""What a model's folder tells by itself: every model that loads passes, and what the libraries know is known here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, T5Config
from transformers.activations import ACT2FN

from conftest import FAMILIES, save_model
from plugbridge.declared import activations, fields_of
from plugbridge.devices import check_device, surely_no_card
from plugbridge.errors import ModelError
from plugbridge.families.spec import family_of
from plugbridge.folders import NUMBERS, check_config, check_vocabularies, check_weights, drops_out, read_vocabulary
from plugbridge.sources import read_model_config
from plugbridge.tensors.checkpoint import DTYPES
from plugbridge.tensors.headers import WIDTHS


def _check(folder: Path, **changes: Any) -> None:
    raw = {**read_model_config(str(folder)), **changes}
    family = family_of(raw["model_type"])
    check_config(str(folder), family, raw)
    check_weights(str(folder), family, raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_they_are_saved_pass(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    _check(folder)
    raw = read_model_config(str(folder))
    for key in list(raw):  # what is left out has a default, of which nothing is said here
        shorter = {name: value for name, value in raw.items() if name != key}
        if key not in ("model_type", "vocab_size", "decoder_start_token_id"):
            check_config(str(folder), family_of(raw["model_type"]), shorter)
    tokens = read_vocabulary(str(folder))
    assert (tokens["<pad>"], tokens["w0"]) == (0, 8)
    check_vocabularies(str(folder), str(folder), (raw, raw))
    save_model(family, tmp_path / "parts").joinpath("model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file({name.removeprefix("transformer."): tensor for name, tensor in half.items()},
                  tmp_path / "parts" / f"{i}.safetensors")  # fmt: skip
    names = {name.removeprefix("transformer."): f"{i}.safetensors" for i, half in enumerate(halves) for name in half}
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _check(tmp_path / "parts")  # GPT-2's without the head's prefix, as the hub has it


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}, "hidden = 16 must be divisible"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": None, "head_dim": None}, "hidden = 16 must be"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads = 4 is not divisible by 3"),
        ("llama", {"hidden_act": "os.system"}, "hidden_act is 'os.system'"),
        ("llama", {"intermediate_size": 8}, "has shape .* config.json says"),
        ("t5", {"feed_forward_proj": "gated-os.system"}, "feed_forward_proj is 'os.system'"),
        ("t5", {"num_decoder_layers": 1}, "holds 13 tensors for which its config.json has no place"),
        ("t5", {"num_decoder_layers": None, "num_layers": 3}, "lacks 19 weights"),
        ("gpt2", {"torch_dtype": 7}, "torch_dtype is 7"),
        ("gpt2", {"n_inner": 7}, "config.json says"),
        ("gpt2", {"layer_norm_epsilon": -0.5}, "layer_norm_epsilon is -0.5; expected a number from 0 to 1"),
        ("gpt2", {"pad_token_id": -(10**30)}, "pad_token_id is -1000000000000000000000000000000; expected a token, -1"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; expected a number from 0 to 1"),
        ("llama", {"attention_dropout": None}, "attention_dropout is null; expected a share from 0 to 1"),
        ("t5", {"dropout_rate": 1.5}, "dropout_rate is 1.5; expected a share from 0 to 1"),
        ("t5", {"relative_attention_max_distance": 0}, "max_distance is 0; expected a whole number above 0"),
        ("t5", {"decoder_start_token_id": None}, "decoder_start_token_id is null; expected a token of the vocabulary"),
        ("t5", {"decoder_start_token_id": 10**6}, "decoder_start_token_id is 1000000; expected a token of the vocab"),
        ("t5", {"decoder_start_token_id": -1}, "decoder_start_token_id is -1; expected a token of the vocabulary"),
    ],
)
def test_models_that_cannot_be(family: str, changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    with pytest.raises(ModelError, match=wanted) as error:
        _check(folder, **changes)
    assert str(folder) in str(error.value)


def test_a_model_that_says_not_what_answers_begin_with_is_refused(tmp_path: Path) -> None:
    folder = save_model("t5", tmp_path)
    raw = read_model_config(str(folder))
    del raw["decoder_start_token_id"]
    with pytest.raises(ModelError, match="has no decoder_start_token_id, which answers begin with; it is usually pad"):
        check_config(str(folder), family_of("t5"), raw)
    gpt2 = read_model_config(str(save_model("gpt2", tmp_path / "gpt2")))
    check_config("x", family_of("gpt2"), {**gpt2, "decoder_start_token_id": None})  # which it does not read
    check_config("x", family_of("gpt2"), {**gpt2, "pad_token_id": -1})  # as the first LLaMA's


def test_what_the_libraries_know_is_known() -> None:
    assert activations() == set(ACT2FN)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == WIDTHS
    assert all(name == "auto" or isinstance(getattr(torch, name), torch.dtype) for name in NUMBERS)
    for config in (GPT2Config(), LlamaConfig(), T5Config()):
        fields = fields_of(config.model_type)
        assert len(fields) >= 15
        raw = {**json.loads(json.dumps(config.to_dict())), "decoder_start_token_id": 0}
        check_config("as it is by default", family_of(config.model_type), raw)
        assert drops_out(raw) == (config.model_type != "llama")
    assert fields_of("gpt2")["n_inner"] == {"int", "None"}
    assert fields_of("gpt2")["resid_pdrop"] == {"int", "float"}
    assert fields_of("of no model") == fields_of("../gpt2") == {}


def test_a_card_that_is_surely_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugbridge.devices.version", lambda _name: "2.11.0")
    monkeypatch.setattr("sys.platform", "linux")
    assert surely_no_card(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not surely_no_card(tmp_path)
    monkeypatch.setattr("sys.platform", "win32")
    assert not surely_no_card(tmp_path / "none")
    monkeypatch.setattr("plugbridge.devices.version", lambda _name: "2.11.0+cpu")
    assert surely_no_card(tmp_path)
    check_device("cpu")
    check_device("auto")
    with pytest.raises(ModelError, match="torch sees no CUDA card; use device: cpu"):
        check_device("cuda")


def test_a_folder_without_a_vocabulary_that_is_read_here(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert read_vocabulary(str(folder)) == read_vocabulary("of/the-hub") == {}
    shutil.copy(folder / "config.json", folder / "tokenizer.json")
    with pytest.raises(ModelError, match="has no `model` with a vocabulary"):
        read_vocabulary(str(folder))
    pieces = {"model": {"vocab": [["a", 0.0], ["b", -1.0], []]}, "added_tokens": [{"content": "<x>", "id": 7}, 3]}
    (folder / "tokenizer.json").write_text(json.dumps(pieces), encoding="utf-8")
    assert read_vocabulary(str(folder)) == {"a": 0, "b": 1, "<x>": 7}
