"""Loading Hugging Face models and tokenizers, with the checks that come before any work."""

import logging
import re
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from plugbridge.devices import NO_CARD
from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout, check_families, check_numbers, family_of, known_family, layout_of
from plugbridge.folders import (
    ACTIVATIONS,
    DROPOUTS,
    SAME,
    check_activation,
    check_embeddings,
    check_stored,
    find_headers,
    no_place,
    other_number,
    quantised_already,
)
from plugbridge.parsing import one_line, shown
from plugbridge.sources import ask_for, check_source, missing_for_sentencepiece, read_model_config, revision
from plugbridge.tensors.checkpoint import DTYPES, Checkpoint
from plugbridge.tensors.headers import AGAIN, read_index

log = logging.getLogger(__name__)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ADVICE = "weights_only"
_NO_TENSORS = f"it is no file of tensors that torch.save wrote; {AGAIN}"
MODEL_CLASS = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


class Tokenizer(Protocol):
    """What plugbridge asks of a Hugging Face tokenizer."""

    pad_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str | list[str]: ...
    def save_pretrained(self, save_directory: str) -> Any: ...


@contextmanager
def tokenizer_errors(doing: str, what: object) -> Generator[None]:
    """Raise ModelError for whatever a tokenizer raises: some cannot read a text of tokens that they do not have."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"the tokenizer cannot {doing} {shown(what)}: {reason_of(error)}") from error


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have a model in training run its blocks again for their gradient instead of keeping what they left."""
    known: Any = model
    how = {"use_reentrant": False}
    if hasattr(known, "activation_checkpointing_enable"):  # its name in later versions of transformers 5
        known.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        known.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


PACKED = "plugbridge"
"""What `quantization_config` in config.json calls a packed Bridge's format (`shrink.packing`)."""


def fuse_gelu(model: nn.Module) -> None:
    """Put PyTorch's own kernel in the place of GELU's tanh form written out in eight operations, of the same value."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                module.add_module(name, nn.GELU(approximate="tanh"))


OUTPUTS: dict[str, Any] = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""What a model returns, whatever its `config.json` asks for."""


def last_positions(count: int, device: torch.device | str) -> Tensor:
    """The last positions of a row, as a causal model's `logits_to_keep`; returns (count,).

    Given the number, transformers takes a slice of the states, which is not contiguous; the head's product with it is
    then one product a row, for which PyTorch copies a bfloat16 head on the CPU row by row.
    """
    return torch.arange(-count, 0, device=device)


def few_logits(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """What keeps a causal model's head off the positions whose logits nobody reads."""
    return {"logits_to_keep": last_positions(1, model.device)} if kind == "causal" else {}


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice, and what libraries warn each other of, out of our output.

    The command line calls it, and every process that it starts.
    """
    if not sys.warnoptions:  # `python -W` shows them
        warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_config(source: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration. Raises ModelError."""
    raw = read_model_config(source)
    family = known_family(raw.get("model_type"))
    if family is not None:  # before anything is built by them
        check_numbers(source, family, raw)
    try:
        asked = {**OUTPUTS, **revision(source)}
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **asked)
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {source}: {reason_of(error)}") from error
    for name in ACTIVATIONS:
        value = getattr(config, name, None)
        if value is not None:
            check_activation(source, name, value, ACT2FN)
    return config


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """A model's tokenizer. Raises ModelError."""
    check_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **revision(source))
    except Exception as error:
        missing = missing_for_sentencepiece() if "tiktoken" in str(error) else ""
        why = f"its sentencepiece model needs {missing}" if missing else reason_of(error)
        raise ModelError(f"cannot read the tokenizer of {source}: {why}") from error
    tokenizer = cast(PreTrainedTokenizerBase, tokenizer)
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # transformers makes one up
        raise ModelError(f"{source} has no tokenizer; expected tokenizer.json or the like beside config.json")
    return cast(Tokenizer, tokenizer)


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantisation: BitsAndBytesConfig | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """A pretrained model in evaluation mode, from safetensors or `weights_only` pickles.

    On device ``meta`` only names and shapes are read: a check that costs no memory.
    A Bridge may be `packed` (`shrink.packing`).
    With `quantisation` weights are quantised while they are read (see `quantised.load_quantised`).
    The checkpoint's `generation_config.json` is not read: how texts are written is `generate`'s.
    Raises ModelError for a family that is not known, unreadable or missing weights, and for tensors that are left
    over or quantised.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    family = family_of(config.model_type)
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None and not (packed and stored.get("quant_method") == PACKED):
        raise ModelError(quantised_already(source))
    try:
        loaded: Any = MODEL_CLASS[family.kind].from_pretrained(
            source,
            dtype=dtype,
            config=config,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            generation_config=GenerationConfig(),
            attn_implementation="sdpa" if family.kind == "causal" else None,
            device_map={"": device} if device == "meta" or quantisation is not None else None,
            **({} if quantisation is None else {"quantization_config": quantisation}),  # None would hide config.json's
            **revision(source),
        )
    except Exception as error:
        why = _misshapen(source, config) or _unpickled(source) or reason_of(error)
        raise ModelError(f"cannot load the model in {source}: {why}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} weights, the first is {shown(missing[0])}; is the checkpoint complete?"
        )
    surplus = sorted(name for name in report["unexpected_keys"] if not name.endswith(family.buffers))
    if surplus:
        raise ModelError(no_place(source, surplus))
    return cast(PreTrainedModel, (model if quantisation is not None else model.to(device)).eval())


def find_checkpoint(source: str) -> Checkpoint | None:
    """A model's safetensors files, opened and checked; None where its weights are in another format.

    Raises ModelError for a broken, contradictory or incomplete set of files.
    """
    found = find_headers(source, partial(_find_file, source))
    return None if found is None else Checkpoint(found.entries, found.stamps)


def check_precision(source: str, model: PreTrainedModel, checkpoint: Checkpoint | None) -> None:
    """Refuse weights that are stored as whole numbers or in 8 bits: without their scales they are no weights.

    `checkpoint` is the model's safetensors files; pickles are looked at where there is none. Raises ModelError.
    """
    own = shapes_of(model)
    entries = ((name, entry.dtype) for name, entry in checkpoint.entries.items()) if checkpoint is not None else None
    for name, kind in entries if entries is not None else _pickled(source):
        if name in own or f"{model.base_model_prefix}.{name}" in own:
            check_stored(source, name, kind)


def _pickled(source: str) -> Iterator[tuple[str, str]]:
    """Name and type of every tensor in a model's pickles; nothing of them stays in memory."""
    whole = _find_file(source, "pytorch_model.bin")
    index = _find_file(source, "pytorch_model.bin.index.json") if whole is None else None
    shards = [whole] if whole is not None else [] if index is None else sorted(set(read_index(index).values()))
    for shard in shards:
        path = shard if isinstance(shard, Path) else _find_file(source, shard)
        if path is not None:
            tensors: dict[str, Tensor] = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
            yield from ((name, NAMES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items())


def _misshapen(source: str, config: PreTrainedConfig) -> str | None:
    """Which tensor of safetensors weights has another shape than the configuration says; transformers names none."""
    with suppress(Exception):  # whatever else is wrong is told already
        checkpoint = find_checkpoint(source)
        with torch.device("meta"):
            empty: Any = MODEL_CLASS[family_of(config.model_type).kind].from_config(config)
        shapes = shapes_of(empty)
        for name, entry in checkpoint.entries.items() if checkpoint is not None else ():
            wanted = shapes.get(name, shapes.get(f"{empty.base_model_prefix}.{name}", entry.shape))
            if wanted != entry.shape:
                return f"tensor {shown(name)} in {entry.shard} has shape {entry.shape}, config.json says {wanted}"
    return None


def _find_file(source: str, name: str) -> Path | None:
    """A file of a local model directory or of a hub id; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    ask_for(source, name)
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **revision(source),
    )
    return None if found is None else Path(found)


def _unpickled(source: str) -> str | None:
    """What is wrong with weights that `torch.save` wrote; transformers does not say of which file it speaks."""
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            return f"{path.name}: {reason_of(error) if _ADVICE in str(error) else _NO_TENSORS}"
    return None


def reason_of(error: Exception) -> str:
    """What another library's exception says, in one line of bounded length."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if _ADVICE in text:  # torch's message ends in how to run what the file holds
        asked = re.search(r"GLOBAL (\S+)", text)
        if asked is None:
            return _NO_TENSORS
        return (
            f"it holds more than tensors ({shown(asked[1])}), which may run any code, so it is not read; "
            "convert it to safetensors where you trust it"
        )
    said = one_line(text)
    return said if said and not isinstance(error, KeyError) else f"{type(error).__name__} {said}".strip()


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's state dict by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def layout_for(model: PreTrainedModel) -> Layout:
    """Meet a loaded model with its family. Raises ModelError."""
    return layout_of(model.config.to_dict(), shapes_of(model))


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model's positions allow, or None for relative positions."""
    for name in ("n_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if value is not None and config.model_type != "t5":
            return int(value)
    return None


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def check_same_tokenizer(small: Tokenizer, large: Tokenizer) -> None:
    """Refuse a pair whose tokenizers differ, and say in what. Raises ModelError."""
    a, b = small.get_vocab(), large.get_vocab()
    if len(a) != len(b):
        raise ModelError(f"small's tokenizer has {len(a)} tokens, large's has {len(b)}; {SAME}")
    for token, number in sorted(a.items(), key=lambda item: item[1]):  # the first that differs
        if b.get(token) != number:
            raise ModelError(other_number(token, number, b.get(token, "absent")))
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(small, name) != getattr(large, name):
            raise ModelError(f"{name} is {getattr(small, name)} for small but {getattr(large, name)} for large; {SAME}")


def check_vocabulary(source: str, tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """Refuse a model that has no embedding for a token of its tokenizer. Raises ModelError."""
    check_embeddings(source, max(tokenizer.get_vocab().values(), default=-1), config.vocab_size)


def check_pair(small: PreTrainedConfig, large: PreTrainedConfig) -> None:
    """Refuse a pair of two families. Raises ModelError."""
    check_families(family_of(small.model_type), family_of(large.model_type))


def drops_out(config: PreTrainedConfig) -> bool:
    """Whether a model in training drops some of its numbers, drawn anew in every forward pass."""
    return any(getattr(config, name, None) for name in DROPOUTS)


def pick_device(name: str) -> str:
    """Resolve ``auto`` to ``cuda`` where there is one, else ``cpu``. Raises ModelError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(NO_CARD)
    return name


def pick_dtype(name: str) -> torch.dtype:
    """A torch dtype by name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
