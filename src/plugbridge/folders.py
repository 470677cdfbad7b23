"""What lies in a model's folder: the files that loading reads, and what they tell before torch is imported.

Names and shapes of tensors are read from headers, `config.json` and the tokenizer's files as JSON. Whatever passes here
is looked at again when the libraries load it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from plugbridge.declared import activations, fields_of, kind_of
from plugbridge.digests import file_digest
from plugbridge.errors import ModelError, ShapeError
from plugbridge.families.spec import Family, Layout, Weight, check_numbers, solve_sizes
from plugbridge.parsing import shown
from plugbridge.sources import commit_of, read_object
from plugbridge.tensors.headers import AGAIN, Entry, Headers, read_headers, read_index
from plugbridge.tensors.patterns import axis_names, infer_sizes, parse, shape_of

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "tekken.json",
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""What peft's checkpoints are, which transformers loads into a model that lies beside them."""
ACTIVATIONS = ("activation_function", "hidden_act", "dense_act_fn")
"""Where configurations name the function between two linear layers."""
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate", "attention_dropout")
"""Shares that the families' configurations give for dropout."""
NUMBERS = (
    "float64", "double", "float32", "float", "float16", "half", "bfloat16", "auto", "float8_e4m3fn", "float8_e5m2",
    "int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool",
)  # fmt: skip
"""What a `config.json` calls the type of its numbers, as torch does; it is not what a run reads them in."""
PRECISIONS = ("F32", "BF16", "F16", "F64")
"""How safetensors names the types in which weights are stored as they are."""
OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that hold one JSON object each."""


def model_files(folder: Path, *, code: bool = False) -> list[Path]:
    """The files of a model's folder that loading it reads: configuration, tokenizer, weights, and `code` if trusted.

    Of weights in several formats the one that is loaded, safetensors first.
    """
    patterns = ["config.json", *TOKENIZER_FILES, *ADAPTER_FILES, *(["*.py"] if code else [])]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = f"{whole}.index.json"
        if (folder / whole).is_file():
            found.add(folder / whole)
            break
        if (folder / index).is_file():
            found |= {folder / index, *(folder / name for name in read_index(folder / index).values())}
            break
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def model_digest(source: str, code: bool, digest: Callable[[Path], Any] = file_digest) -> dict[str, Any]:
    """What makes a model: its configuration, tokenizer and weights. What else lies in its folder changes nothing."""
    folder = Path(source)
    if not folder.is_dir():
        return {"source": source, "commit": commit_of(source)}
    return {"files": {path.name: digest(path) for path in model_files(folder, code=code)}}


def find_headers(source: str, find: Callable[[str], Path | None]) -> Headers | None:
    """The headers of a model's safetensors files, by name found with `find`; None where its weights are no such files.

    Raises ModelError for a broken, contradictory or incomplete set of files.
    """
    whole = find("model.safetensors")
    if whole is not None:
        return read_headers([whole])
    index = find("model.safetensors.index.json")
    if index is None:
        return None
    names = read_index(index)
    headers = read_headers(_shards(source, index, names, find))
    for name, shard in names.items():
        if name not in headers.entries or headers.entries[name].shard.name != shard:
            raise ModelError(f"tensor {shown(name)} is not in {shard} of {source}, where {index.name} says it is")
    return headers


def _shards(source: str, index: Path, names: dict[str, str], find: Callable[[str], Path | None]) -> list[Path]:
    """All files that an index names. Raises ModelError for one that is not there."""
    paths: list[Path] = []
    held = {shard: name for name, shard in reversed(names.items())}  # the first tensor of each
    for shard, name in sorted(held.items()):
        path = find(shard)
        if path is None:
            raise ModelError(f"{source} has no {shard}, where {index.name} says that tensor {shown(name)} is; {AGAIN}")
        paths.append(path)
    return paths


def check_config(source: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a `config.json` whose values are no model's of the family; what it leaves out has a default.

    Raises ModelError.
    """
    check_numbers(source, family, config)
    where = f"config.json of {source}"
    if config.get("quantization_config") is not None:
        raise ModelError(quantised_already(source))
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in NUMBERS):
            raise ModelError(f"{where}: {name} is {shown(value)}; expected a type of numbers such as float32")
    _check_values(where, family, config)
    for name, function in _functions(config).items():
        check_activation(source, name, function, activations())
    try:
        sizes = solve_sizes(family, config)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    for left, right in family.constraints.divisible:
        whole, unit = (_product_given(side, family, config, sizes) for side in (left, right))
        if whole is not None and unit is not None and whole % unit:
            raise ModelError(f"{where}: {left} = {whole} must be divisible by {right} = {unit}")


def _check_values(where: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a value of a kind that transformers does not take for its key, and no share of numbers to be dropped."""
    for name, kinds in fields_of(family.model_type).items():
        if name in config and kind_of(config[name]) not in kinds:
            expected = " or ".join(sorted(kind for kind in kinds if kind != "None"))
            raise ModelError(f"{where}: {name} is {json.dumps(config[name])[:80]}; expected {expected}")
    for name in ("rope_scaling", "rope_parameters"):
        if kind_of(config.get(name)) not in ("dict", "None"):
            raise ModelError(f"{where}: {name} is {json.dumps(config[name])[:80]}; expected an object")
    if family.kind == "seq2seq" and "decoder_start_token_id" not in config:
        raise ModelError(f"{where} has no decoder_start_token_id, which answers begin with; it is usually pad_token_id")
    for name, (expected, holds) in _numbers(family, config).items():
        if name in config and not holds(config[name]):
            raise ModelError(f"{where}: {name} is {json.dumps(config[name])[:80]}; expected {expected}")


def _numbers(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """What numbers have to be that loading takes as they are, and the network fails on or makes NaN of; by key."""

    def between(low: float, high: float, *kinds: type) -> Callable[[Any], bool]:
        return lambda value: type(value) in kinds and low <= value <= high

    share = ("a share from 0 to 1", between(0, 1, int, float))
    start = ("a token of the vocabulary", between(0, (config.get("vocab_size") or math.inf) - 1, int))
    return {
        **dict.fromkeys(DROPOUTS, share),
        family.norm_eps: ("a number from 0 to 1", between(0, 1, int, float)),
        "pad_token_id": ("a token, -1 or null", lambda value: value is None or between(-1, 2**31 - 1, int)(value)),
        "relative_attention_max_distance": ("a whole number above 0", between(1, math.inf, int)),
        **({"decoder_start_token_id": start} if family.kind == "seq2seq" else {}),
    }


def quantised_already(source: str) -> str:
    """What is said of a checkpoint that was quantised by somebody else."""
    return (
        f"the weights of {source} are quantised already, as config.json says; expected full weights, which "
        "large.load_in quantises"
    )


def _product_given(side: str, family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> int | None:
    """A product of axes, from their sizes or as an attribute has it; None where nothing tells."""
    if all(axis in sizes for axis in side.split()):
        return math.prod(sizes[axis] for axis in side.split())
    attribute = next((name for name, expression in family.config.items() if expression == side), "")
    return config.get(attribute)


def check_activation(source: str, name: str, value: Any, known: Iterable[str] | None) -> None:
    """Refuse a function between layers that transformers does not know. Raises ModelError."""
    if not isinstance(value, str) or (known is not None and value not in known):
        raise ModelError(
            f"config.json of {source}: {name} is {shown(value)}, which transformers does not know; expected an "
            "activation such as gelu_new"
        )


def _functions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The activations that a configuration names, by key. T5's may be said to be gated."""
    found = {name: config[name] for name in ACTIVATIONS if config.get(name) is not None}
    if (gated := config.get("feed_forward_proj")) is not None:
        found["feed_forward_proj"] = gated.removeprefix("gated-") if isinstance(gated, str) else gated
    return found


def drops_out(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a share of numbers that training drops; what it leaves out may have a default."""
    return any(config.get(name) for name in DROPOUTS)


def check_weights(source: str, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose files of weights are not whole, or whose tensors are not those of its `config.json`.

    Pickles are not looked into, and other sources than folders not at all. Raises ModelError.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    headers = find_headers(source, partial(_file_in, folder))
    layers = _layers(family, config)
    if headers is not None and layers is not None:
        _check_tensors(source, headers, Layout(family, solve_sizes(family, config), layers))
    index = _file_in(folder, "pytorch_model.bin.index.json")
    if headers is None and index is not None and _file_in(folder, "pytorch_model.bin") is None:
        _shards(source, index, read_index(index), partial(_file_in, folder))


def _file_in(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None


def _layers(family: Family, config: Mapping[str, Any]) -> dict[str, int] | None:
    """Layers of every stack, as many as the first has where nothing is said; None where that one says nothing."""
    first = config.get(next(iter(family.stack.values())).layers)
    found = {name: config.get(stack.layers) or first for name, stack in family.stack.items()}
    return None if first is None else {name: int(count or first) for name, count in found.items()}


def _check_tensors(source: str, headers: Headers, layout: Layout) -> None:
    """Compare what is stored with what the configuration asks for: types, shapes, and blocks missing or too many.

    Checkpoints name weights with the whole model's prefix or without. Embeddings and heads may be tied, and are left to
    whoever loads them, as are names that no family file has.
    """
    table = layout.table()
    bare = {_bare(name, layout.family): weight for name, weight in table.items()}
    sizes, stored = dict(layout.sizes), set[str]()
    for name, entry in headers.entries.items():
        weight = table.get(name) or bare.get(name)
        if weight is not None:
            check_stored(source, name, entry.dtype)
            _check_shape(source, name, entry, weight, sizes)
            stored.add(weight.name)
    missing = sorted(
        name for name, weight in table.items()
        if not weight.optional and name not in stored and "vocab" not in axis_names(weight.pattern)
    )  # fmt: skip
    surplus = sorted(name for name in headers.entries if _is_of_a_block_too_many(name, layout))
    if stored and missing and not surplus:
        raise ModelError(
            f"{source} lacks {len(missing)} weights, the first is {shown(missing[0])}; is the checkpoint complete?"
        )
    if stored and surplus and not missing:
        raise ModelError(no_place(source, surplus))


def no_place(source: str, surplus: Sequence[str]) -> str:
    """What is said of a checkpoint that holds more than its configuration has."""
    return (
        f"{source} holds {len(surplus)} tensors for which its config.json has no place, the first is "
        f"{shown(surplus[0])}; is it the checkpoint's own config.json?"
    )


def check_stored(source: str, name: str, kind: str) -> None:
    """Refuse a weight that is stored as whole numbers or in 8 bits: it has lost its scales. Raises ModelError."""
    if kind not in PRECISIONS:
        raise ModelError(
            f"tensor {shown(name)} of {source} is of type {kind}; expected {', '.join(PRECISIONS)}: are the weights "
            "quantised, and their scales or config.json's quantization_config lost?"
        )


def _check_shape(source: str, name: str, entry: Entry, weight: Weight, sizes: dict[str, int]) -> None:
    """Refuse a shape that the sizes so far do not give, and take note of those that it tells. Raises ModelError."""
    unknown = [[axis for axis in dim if axis not in sizes] for dim in parse(weight.pattern)]
    if not any(unknown):
        wanted = shape_of(weight.pattern, sizes)
        if tuple(wanted) != entry.shape:
            raise ModelError(
                f"cannot load the model in {source}: tensor {shown(name)} in {entry.shard} has shape {entry.shape}, "
                f"config.json says {tuple(wanted)}"
            )
    elif all(len(axes) <= 1 for axes in unknown):
        try:
            sizes.update(infer_sizes(weight.pattern, entry.shape, sizes, name))
        except ShapeError as error:
            raise ModelError(f"cannot load the model in {source}: {error}; are weights and config.json of one model?") from error  # fmt: skip  # noqa: E501


def _bare(name: str, family: Family) -> str:
    """A weight's name as a checkpoint of the model without its head has it."""
    return name.partition(".")[2] if family.kind == "causal" else name


def _is_of_a_block_too_many(name: str, layout: Layout) -> bool:
    """Whether a tensor is a weight of a block behind the last one that the configuration has."""
    for key, stack in layout.family.stack.items():
        head = stack.path.partition("{}")[0]
        for begin in (head, _bare(head, layout.family)):
            number, _, rest = name.removeprefix(begin).partition(".")
            if name.startswith(begin) and number.isdecimal() and int(number) >= layout.layers[key]:
                return rest in stack.weights or f"{rest}?" in stack.weights
    return False


def read_vocabulary(source: str) -> dict[str, int]:
    """The tokens of a folder's `tokenizer.json` by text, as far as it says; empty where there is none to be read.

    The tokenizer's other JSON files are looked at, too. Raises ModelError for one that is no JSON object, and for a
    `tokenizer.json` without a model.
    """
    folder = Path(source)
    found = {name: read_object(source, folder / name, "tokenizer") for name in OBJECTS if (folder / name).is_file()}
    whole = found.get("tokenizer.json")
    if whole is None:
        return {}
    model = whole.get("model")
    if not isinstance(model, dict):
        raise ModelError(
            f"cannot read the tokenizer of {source}: tokenizer.json has no `model` with a vocabulary; {AGAIN}"
        )
    added = whole.get("added_tokens")
    return _tokens_of(cast(dict[str, Any], model).get("vocab")) | _added(added if isinstance(added, list) else [])


def _tokens_of(vocab: Any) -> dict[str, int]:
    """Numbers by token: of an object of them, or of a list of pieces with their scores."""
    if isinstance(vocab, dict):
        return {token: number for token, number in cast(dict[str, Any], vocab).items() if type(number) is int}
    pieces = cast(list[Any], vocab) if isinstance(vocab, list) else []
    named = (piece[0] if isinstance(piece, list) and piece else None for piece in pieces)
    return {name: i for i, name in enumerate(named) if isinstance(name, str)}


def _added(tokens: list[Any]) -> dict[str, int]:
    entries = [cast(dict[str, Any], token) for token in tokens if isinstance(token, dict)]
    return {
        entry["content"]: entry["id"]
        for entry in entries
        if isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }


def check_vocabularies(small: str, large: str, configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse folders whose tokenizers number a token in two ways, or have one that the model has no embedding for.

    What only a tokenizer that is loaded tells (how texts are split, what its class adds) stays to `prepare`.
    Raises ModelError.
    """
    first, second = read_vocabulary(small), read_vocabulary(large)
    for source, tokens, config in zip((small, large), (first, second), configs, strict=True):
        size = config.get("vocab_size")
        if size is not None:
            check_embeddings(source, max(tokens.values(), default=-1), size)
    if first != second:
        token = next((token for token, number in first.items() if second.get(token, number) != number), None)
        if token is not None:
            raise ModelError(other_number(token, first[token], second[token]))


SAME = "a module can only move between models that read the same tokens"


def other_number(token: str, small: int, large: int | str) -> str:
    """What is said of a token that the two models know by other numbers."""
    return f"token {shown(token)} is {small} for small but {large} for large; {SAME}"


def check_embeddings(source: str, largest: int, embeddings: int) -> None:
    """Refuse a model that has no embedding for the last token of its tokenizer. Raises ModelError."""
    if largest >= embeddings:
        raise ModelError(
            f"{source}: the tokenizer has token {largest} but the model only {embeddings} embeddings; "
            "is it the model's own tokenizer?"
        )
