"""Where models come from: what can be no directory, and what a vocabulary needs to be read."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from conftest import save_model
from plugbridge import sources
from plugbridge.config import TaskConfig, load_config
from plugbridge.digests import file_digest
from plugbridge.errors import DataError, ModelError, PlugbridgeError
from plugbridge.models import find_checkpoint
from plugbridge.sources import check_files, check_source, missing_for_sentencepiece
from plugbridge.tasks.own import own_rows, own_task


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("~nosuchuser/x", "'~nosuchuser/x' can be no path: Could not determine home directory."),
        ("/" + "a" * 5000, "can be no path: File name too long"),
        ("a\0b", "'a\\x00b' can be no path: it has a NUL character"),
        ("\ud800", "can be no path: 'utf-8' codec can't encode"),
        ("/dev/null", "/dev/null is a file; expected a Hugging Face model directory"),
    ],
)
def test_what_can_be_no_directory_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_source(source)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "c.yaml").write_text(
        "small: ./loop\nlarge: b\ntask: {file: loop, prompt: '{text}', words: {a: x, b: y}}\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "c.yaml")
    assert isinstance(config.task, TaskConfig)
    assert config.task.file == str(tmp_path / "loop")
    with pytest.raises(DataError, match=r"cannot read task file .*loop: Too many levels of symbolic links"):
        own_rows(config.task, own_task(config.task), "causal", 0)
    with pytest.raises(ModelError, match=r"model directory .*loop does not exist"):
        check_source(config.small)
    with pytest.raises(PlugbridgeError, match=r"cannot read .*loop: Too many levels of symbolic links"):
        file_digest(tmp_path / "loop")


def test_a_hub_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(ModelError, match="is no directory here, is not in the Hugging Face cache, and the hub cannot"):
        sources.pinned("some/model")
    assert not caplog.messages
    assert logging.getLogger("huggingface_hub").level == before


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """The hub may be asked, though there is none; returns the cache's folder, which is empty."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    caplog.set_level(logging.INFO, "plugbridge")

    def retried(*_: Any) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", retried)
    return tmp_path / "hub"


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="is not in the Hugging Face cache, and the hub cannot be reached; check"):
            sources.pinned("some/model")
    assert caplog.messages == ["asking the Hugging Face hub for config.json of some/model"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # of processes that are begun from now on


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(sources, "PATIENCE", 0.05)
        with pytest.raises(ModelError, match="the hub cannot be reached"):
            sources.read_model_config("some/model")


def test_without_the_hub_its_cache_is_read_and_this_is_said(online: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit = "0" * 40
    model = online / "models--some--model"
    save_model("gpt2", model / "snapshots" / commit, hidden=8, layers=1, heads=2)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    for _ in range(2):
        source = sources.pinned("some/model")
        assert sources.commit_of(source) == commit
        assert sources.read_model_config(source)["model_type"] == "gpt2"
    assert [message for message in caplog.messages if "cannot be reached" in message] == [
        "the Hugging Face hub cannot be reached; models are taken from its cache as they are there"
    ]


def test_what_the_cache_has_of_a_commit_is_not_asked_for(online: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit = "0" * 40
    save_model("gpt2", online / "models--some--model" / "snapshots" / commit, hidden=8, layers=1, heads=2)
    source = sources.HubId("some/model", commit)
    assert find_checkpoint(source) is not None
    assert caplog.messages == []
    (online / "models--some--model" / "snapshots" / commit / "model.safetensors").unlink()
    assert find_checkpoint(source) is None
    assert caplog.messages == ["asking the Hugging Face hub for model.safetensors of some/model"]


def test_a_vocabulary_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "spiece.model")
    assert not sources.is_sentencepiece(tmp_path / "spiece.model")


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A T5 as it was released: its vocabulary is a sentencepiece model, and nothing else."""
    source = save_model("t5", tmp_path / "model", hidden=8, layers=1, heads=2)
    for path in source.glob("tokenizer*"):
        path.unlink()
    (source / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2")
    return source


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        (
            (),
            "spiece.model needs sentencepiece and protobuf; pip install sentencepiece protobuf, or add tokenizer.json",
        ),
        (("sentencepiece",), "spiece.model needs protobuf; pip install protobuf, or add tokenizer.json"),
        (("sentencepiece", "google.protobuf"), None),
    ],
)
def test_what_a_sentencepiece_model_needs_is_said(
    pieces: Path, installed: tuple[str, ...], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that it is a file for tiktoken, as transformers has it."""
    monkeypatch.setattr(sources, "_is_installed", lambda module: module in installed)
    assert bool(missing_for_sentencepiece()) == (wanted is not None)
    if wanted is None:
        check_files(str(pieces))
        return
    with pytest.raises(ModelError) as caught:
        check_files(str(pieces))
    assert str(caught.value) == f"cannot read the tokenizer of {pieces}: {wanted}"
    (pieces / "spiece.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format
    check_files(str(pieces))
