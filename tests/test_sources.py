"""Where models come from: what can be no directory, and what a vocabulary needs to be read."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from conftest import save_model
from plugbridge import sources
from plugbridge.config import TaskConfig, load_config
from plugbridge.digests import file_digest
from plugbridge.errors import DataError, ModelError, PlugbridgeError
from plugbridge.sources import check_files, check_source, missing_for_sentencepiece
from plugbridge.tasks.own import own_rows, own_task


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("~nosuchuser/x", "'~nosuchuser/x' can be no path: Could not determine home directory."),
        ("/" + "a" * 5000, "can be no path: File name too long"),
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
