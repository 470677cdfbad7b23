"""Safetensors files read one tensor at a time: the same bytes, and every kind of broken file named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model, save_model
from plugbridge.errors import ModelError
from plugbridge.models import find_checkpoint, load_model
from plugbridge.tensors.checkpoint import Checkpoint, open_checkpoint
from plugbridge.tensors.headers import read_index

TENSORS = {
    "a.float": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "b.half": torch.arange(7).to(torch.bfloat16),
    "c.bool": torch.tensor([[True, False], [False, True]]),
    "d.scalar": torch.tensor(3.5, dtype=torch.float64),
    "e.empty": torch.zeros(0, 4),
    "f.whole": torch.arange(6).reshape(2, 3),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def _opened(source: Path) -> Checkpoint:
    found = find_checkpoint(str(source))
    assert found is not None
    return found


def test_every_tensor_is_read_as_it_is_stored(shard: Path) -> None:
    checkpoint = open_checkpoint([shard])
    assert set(checkpoint.entries) == set(TENSORS)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
        assert torch.equal(checkpoint.read(name, torch.float64), tensor.double()), name


@pytest.mark.parametrize("size", ["5GB", "6KB"])
def test_a_models_files_sharded_or_not(tmp_path: Path, size: str) -> None:
    model = make_model("t5")
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 2) == (size == "6KB")
    checkpoint = _opened(tmp_path)
    stored = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert set(checkpoint.entries) == set(stored)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in stored.items())


def test_pickled_weights_are_no_checkpoint(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert find_checkpoint(str(tmp_path)) is None


def test_a_truncated_file_is_named_with_the_first_tensor_that_is_cut(shard: Path) -> None:
    entry = open_checkpoint([shard]).entries["b.half"]
    os.truncate(shard, entry.stop - 1)
    with pytest.raises(ModelError, match=r"model.safetensors is truncated: tensor 'b.half' ends at byte \d+") as error:
        open_checkpoint([shard])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_a_file_without_a_whole_header_is_named(shard: Path, size: int) -> None:
    os.truncate(shard, size)
    with pytest.raises(ModelError, match=r"model.safetensors is (truncated|corrupt)"):
        open_checkpoint([shard])


def _with_header(shard: Path, change: dict[str, object]) -> None:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a.float"] = {**header["a.float"], **change}
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("change", [{"shape": [3, 6]}, {"data_offsets": [4, 64]}, {"dtype": "F16"}])
def test_a_corrupt_header_is_named_with_its_tensor(shard: Path, change: dict[str, object]) -> None:
    _with_header(shard, change)
    with pytest.raises(ModelError, match=r"model.safetensors is corrupt: the bytes of tensor '"):
        open_checkpoint([shard])


@pytest.mark.parametrize("junk", [b"junk", b"x" * 200])
def test_bytes_that_are_no_safetensors_are_refused(shard: Path, junk: bytes) -> None:
    shard.write_bytes(shard.read_bytes() + junk)
    with pytest.raises(ModelError, match=f"it has {len(junk)} bytes after tensor"):
        open_checkpoint([shard])
    shard.write_bytes((len(junk)).to_bytes(8, "little") + junk)
    with pytest.raises(ModelError, match="its header is no safetensors header"):
        open_checkpoint([shard])


def test_a_file_that_changes_after_it_was_opened_is_noticed(shard: Path) -> None:
    checkpoint = open_checkpoint([shard])
    checkpoint.read("a.float")
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ModelError, match=r"has changed while the run .* reading tensor 'a.float'"):
        checkpoint.read("a.float")
    checkpoint = open_checkpoint([shard])
    save_file(TENSORS, shard.with_name("other"))
    shard.with_name("other").replace(shard)
    with pytest.raises(ModelError, match="has changed"):
        checkpoint.read("a.float")
    shard.unlink()
    with pytest.raises(ModelError, match=r"cannot read tensor 'a.float' of"):
        checkpoint.read("a.float")


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path, max_shard_size="6KB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name, shard = next(iter(raw["weight_map"].items()))
    raw["weight_map"]["no.such"] = shard
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=f"tensor 'no.such' is not in {shard}"):
        find_checkpoint(str(tmp_path))
    (tmp_path / shard).unlink()
    with pytest.raises(ModelError, match=f"has no {shard}, where {index.name} says that tensor '{name}' is"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"weight_map": ["a"]}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "{",
        "[" * 100_000,
        "[Infinity]",
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "/b.safetensors"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "b\\u0000"}}',
        '{"weight_map": {"a": "b", "a": "c"}}',
    ],
)
def test_what_is_no_index_is_said(tmp_path: Path, text: str) -> None:
    make_model("gpt2").save_pretrained(tmp_path, max_shard_size="6KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ModelError, match=f"{index.name} is no index of a sharded checkpoint"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [None], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
        [],
    ],
)
def test_a_header_of_other_things_is_corrupt(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ModelError, match="its header is no safetensors header"):
        open_checkpoint([shard])


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        "[" * 100_000,
        "[" * 70 + "]" * 70,
        "[1]",
        '{"\\ud800": 1}',
        "\xff",
    ],
)
def test_a_header_that_is_not_plain_json_is_corrupt_in_one_line(tmp_path: Path, text: str) -> None:
    header = text.encode("latin-1")
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match=r"^.*model.safetensors is corrupt: its header is no safetensors header.*$"):
        open_checkpoint([shard])


@pytest.mark.parametrize("kind", ["pipe", "folder", "gone"])
def test_what_is_no_file_is_said(tmp_path: Path, kind: str) -> None:
    """A pipe is not waited for."""
    index = tmp_path / "model.safetensors.index.json"
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "folder":
        index.mkdir()
    what = {"pipe": "it is a pipe, not a file", "folder": "it is a directory, not a file", "gone": "No such file"}
    with pytest.raises(ModelError, match=what[kind]):
        read_index(index)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"'transformer.h.0.mlp.c_fc.weight' in .*model.safetensors has shape \(3, 5\)"
    ):
        load_model(str(tmp_path))


def test_a_type_that_cannot_be_streamed_is_said_before_anything_is_read(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(4).to(torch.float8_e4m3fn)}, shard)
    with pytest.raises(ModelError, match=r"tensor 'b' in .* is of type 'F8_E4M3', which cannot be streamed"):
        open_checkpoint([shard]).require_readable()
