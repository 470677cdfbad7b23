"""Where models come from: local directories and ids of the Hugging Face hub, and their `config.json`.

Knows no model and imports nothing heavy: what these files tell is told before anything is loaded.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, cast

from plugbridge.errors import ModelError
from plugbridge.parsing import one_line, path_of, read_json
from plugbridge.tensors.headers import AGAIN

log = logging.getLogger(__name__)

PATIENCE = 4.0
"""Seconds that the hub has to answer at all, once asked."""
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Files of which a model directory has one."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files of which a tokenizer has one."""
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules that transformers reads a sentencepiece model with, and their packages' names."""


class HubId(str):
    """A model's id on the hub together with the commit that is read: to everybody else it is the id."""

    commit: str

    def __new__(cls, name: str, commit: str) -> "HubId":
        made = super().__new__(cls, name)
        made.commit = commit
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return str(self), self.commit


def pinned(source: str) -> str:
    """A hub id with the commit that its branch is at now; a directory stays as it is. Raises ModelError.

    Whatever is loaded from it afterwards is of that commit.
    """
    check_source(source)
    if isinstance(source, HubId) or Path(source).is_dir():
        return source
    folder = _hub_file(source, "config.json").parent
    return HubId(source, folder.name) if folder.parent.name == "snapshots" else source


def commit_of(source: str) -> str | None:
    """The commit that a source is pinned to."""
    return source.commit if isinstance(source, HubId) else None


def commits_of(small: str, large: str) -> dict[str, str]:
    """The commits of both models by size, of those that are pinned to one."""
    found = {"small": commit_of(small), "large": commit_of(large)}
    return {size: commit for size, commit in found.items() if commit is not None}


def revision(source: str) -> dict[str, str]:
    """What transformers is told of the commit."""
    return {"revision": source.commit} if isinstance(source, HubId) else {}


def check_source(source: str) -> None:
    """Refuse a missing directory before the hub is asked for it. Raises ModelError.

    Without this, a mistyped path costs 23 seconds of retries and five tracebacks.
    """
    path = path_of(source, "model", ModelError)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    if path.is_dir():
        if not path_of(str(path / "config.json"), "model", ModelError).exists():
            raise ModelError(f"{source} has no config.json; expected a Hugging Face model directory")
        return
    if path.exists():
        raise ModelError(f"{source} is a file; expected a Hugging Face model directory")
    if looks_local and source.count("/") > 0:
        raise ModelError(f"model directory {source} does not exist; check the path in the config")


def check_files(source: str, *, own_tokenizer: bool = False) -> None:
    """Refuse a local model directory without weights or vocabulary. Raises ModelError.

    With `own_tokenizer` it may have code that reads a vocabulary of another name.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(f"{source} has no weights; expected model.safetensors or the like beside config.json")
    if not own_tokenizer and not any(next(folder.glob(name), None) for name in VOCABULARIES):
        raise ModelError(f"{source} has no tokenizer; expected tokenizer.json or the like beside config.json")
    vocabulary = next((path for path in sorted(folder.glob("*.model")) if is_sentencepiece(path)), None)
    missing = missing_for_sentencepiece()
    if vocabulary is not None and not (folder / "tokenizer.json").is_file() and missing:
        raise ModelError(f"cannot read the tokenizer of {source}: {vocabulary.name} needs {missing}")


def is_sentencepiece(path: Path) -> bool:
    """Whether a vocabulary is a sentencepiece model, by its first byte: others of the same name are texts."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(1) == b"\n"  # the tag of a list of pieces
    except OSError:
        return False


def missing_for_sentencepiece() -> str:
    """What has to be installed before a sentencepiece model can be read, with the command; empty if nothing has to."""
    missing = [name for module, name in SENTENCEPIECE.items() if not _is_installed(module)]
    return f"{' and '.join(missing)}; pip install {' '.join(missing)}, or add tokenizer.json" if missing else ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False


def read_model_config(source: str) -> dict[str, Any]:
    """A model's `config.json` as it was written. Raises ModelError."""
    check_source(source)
    path = Path(source) / "config.json" if Path(source).is_dir() else _hub_file(source, "config.json")
    return read_object(source, path, "configuration")


def read_object(source: str, path: Path, what: str) -> dict[str, Any]:
    """One of a model's JSON files, `what` it is of the model. Raises ModelError for what is no JSON object."""
    try:
        value = read_json(path, ModelError)
    except ModelError as error:
        raise ModelError(f"cannot read the {what} of {source}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read the {what} of {source}: {path.name} holds no JSON object; {AGAIN}")
    return cast(dict[str, Any], value)


def ask_hub(what: str) -> bool:
    """Say that the Hugging Face hub is asked for something; returns whether it can be, or need not be, reached.

    Where it does not answer at all, its libraries go by their cache from now on, in this process and those that it
    begins. Else they would try again and again, for 23 seconds or more a file and without a word.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    log.info("asking the Hugging Face hub for %s", what)
    if _answers(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    return False


def _answers(endpoint: str) -> bool:
    """Whether there is any answer, of whatever status, within `PATIENCE` seconds."""
    from huggingface_hub import get_session

    answered = False

    def ask() -> None:
        nonlocal answered
        with suppress(Exception):  # of several libraries, by the hub's version
            get_session().head(endpoint, timeout=PATIENCE)
            answered = True

    asking = Thread(target=ask, daemon=True)  # to resolve a name has no timeout of its own
    asking.start()
    asking.join(PATIENCE)
    return answered


def ask_for(source: str, name: str) -> bool:
    """`ask_hub` for a file of a hub id, unless the cache knows of the commit that it is read of."""
    from huggingface_hub import try_to_load_from_cache

    commit = commit_of(source)
    known = commit is not None and try_to_load_from_cache(str(source), name, revision=commit) is not None
    return known or ask_hub(f"{name} of {source}")


@contextmanager
def _without_retries_told() -> Generator[None]:
    """Keep the hub's client from two lines for each of its attempts: what came of them is told in one."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _hub_file(source: str, name: str) -> Path:
    """A file of a hub id, from its cache or downloaded into it. Raises ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reached = ask_for(source, name)
    try:
        with _without_retries_told():
            found = Path(hf_hub_download(source, name, revision=commit_of(source)))
    except GatedRepoError as error:
        raise ModelError(
            f"{source} is gated on the Hugging Face hub; accept its terms on its page and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{source} is neither a directory here nor a model on the Hugging Face hub; check the name in the config"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{source} is no directory here, is not in the Hugging Face cache, and the hub cannot be reached; "
            "check the name, or give a directory"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{source} on the Hugging Face hub has no {name}; expected a model of transformers") from error
    except Exception as error:
        raise ModelError(f"cannot read {name} of {source} from the Hugging Face hub: {one_line(error)}") from error
    if not reached:
        log.warning("the Hugging Face hub cannot be reached; models are taken from its cache as they are there")
    return found
