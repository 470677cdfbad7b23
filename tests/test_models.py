"""What a model's files may hold instead of what they should: told in one line, nothing of it run or waited for."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_model
from plugbridge.errors import ModelError
from plugbridge.models import load_config, load_model, load_tokenizer, reason_of

Spoil = Callable[[Path], object]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_model_returns_what_is_read_whatever_its_config_asks_for(tmp_path: Path, family: str) -> None:
    folder = save_model(family, tmp_path / "model")
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    others = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    path.write_text(json.dumps({**raw, **others}), encoding="utf-8")
    model = load_model(str(folder))
    tokens = torch.ones(1, 3, dtype=torch.long)
    found = model(input_ids=tokens, **({"labels": tokens} if family == "t5" else {}))
    assert found.logits.shape[:2] == (1, 3)
    assert not [name for name in found if "attentions" in name or name.endswith("hidden_states")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model("gpt2", tmp_path / "model", hidden=8, layers=1, heads=2)


def told(work: Callable[[str], object], source: Path) -> str:
    with pytest.raises(ModelError) as caught:
        work(str(source))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


def config(**changes: Any) -> Spoil:
    def spoil(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def text(name: str, content: str) -> Spoil:
    return lambda source: (source / name).write_text(content)


def pipe(source: Path) -> None:
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")


CONFIGURATIONS: dict[str, tuple[Spoil, str]] = {
    "fewer layers than none": (config(n_layer=-1), "n_layer is -1; expected a whole number from 1 to 4,096"),
    "layers without end": (config(n_layer=10_000_000), "n_layer is 10000000; expected a whole number from 1 to 4,096"),
    "no heads": (config(n_head=0), "n_head is 0; expected a whole number from 1"),
    "half a channel": (config(n_embd=8.5), "n_embd is 8.5; expected a whole number from 1"),
    "a number as a text": (config(n_embd="8"), 'n_embd is "8"; expected a whole number from 1'),
    "a truth value": (config(n_layer=True), "n_layer is true; expected a whole number from 1"),
    "an activation that is code": (
        config(activation_function="os.system"),
        "activation_function is 'os.system'",
    ),
    "no activation": (config(activation_function=[]), "Field 'activation_function' expected str, got list"),
    "a wrong type": (config(layer_norm_epsilon="x"), "Field 'layer_norm_epsilon' expected float, got str (value: 'x')"),
    "no such precision": (config(dtype="float7"), "module 'torch' has no attribute 'float7'"),
    "a list for a type": (config(model_type=["gpt2"]), "cannot read the configuration of "),
    "infinity": (text("config.json", '{"model_type": "gpt2", "n_layer": Infinity}'), "Infinity is no number of JSON"),
    "a key twice": (text("config.json", '{"model_type": "gpt2", "model_type": "t5"}'), "'model_type' stands twice"),
    "brackets": (text("config.json", "[" * 100_000), "more than 64 levels of brackets"),
    "a list": (text("config.json", "[1]"), "config.json holds no JSON object"),
    "nothing": (text("config.json", ""), "not JSON (Expecting value"),
    "no text": (lambda source: (source / "config.json").write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    "a pipe": (pipe, "it is a pipe, not a file"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_is_no_configuration_is_one_line(source: Path, name: str) -> None:
    spoil, message = CONFIGURATIONS[name]
    spoil(source)
    assert message in told(load_config, source)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "os.system"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"bos_token": 3}'),
    ],
)
def test_what_is_no_tokenizer_is_one_line(source: Path, name: str, content: str) -> None:
    (source / name).write_text(content)
    assert told(load_tokenizer, source).startswith(f"cannot read the tokenizer of {source}: ")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


PICKLES: dict[str, tuple[Spoil, str]] = {
    "code": (lambda path: torch.save({"a": Evil()}, path), "may run any code, so it is not read; convert it to"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": Evil()})), "pytorch_model.bin: it "),
    "junk": (
        lambda path: path.write_bytes(b"hello"),
        "it is no file of tensors that torch.save wrote; download",
    ),
    "nothing": (lambda path: path.write_bytes(b""), "it is no file of tensors that torch.save wrote; download"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_more_than_tensors_are_told_in_our_words(
    source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own advice is to load them anyway."""
    monkeypatch.chdir(source)
    (source / "model.safetensors").unlink()
    spoil, message = PICKLES[name]
    spoil(source / "pytorch_model.bin")
    line = told(load_model, source)
    assert line.startswith(f"cannot load the model in {source}: pytorch_model.bin: ")
    assert message in line
    assert "weights_only" not in line
    assert not Path("owned").exists()


def test_a_foreign_message_keeps_what_it_says_last() -> None:
    """Of many lines the cause is often none of the first."""
    error = ValueError("We could not:\n\n" + "\x1b[1mtry this\x1b[0m\n" * 100 + "the cause")
    said = reason_of(error)
    assert said.startswith("We could not: try this try this")
    assert said.endswith("the cause")
    assert "\n" not in said
    assert len(said) < 310
    assert reason_of(KeyError("os.system")) == "KeyError 'os.system'"
    assert reason_of(EOFError()) == "EOFError"
