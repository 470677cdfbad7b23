"""Tiny random models of every family on disk, a word-level tokenizer, and a learnable toy task."""

import copy
import functools
import gc
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

gc.disable()  # until everything is imported: there is no garbage to find among modules
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and so by tests' processes

from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

from plugbridge.cost import measure, return_blocks, settle  # noqa: E402
from plugbridge.families.spec import Layout  # noqa: E402
from plugbridge.interrupts import ENDING  # noqa: E402
from plugbridge.memory.case import Case  # noqa: E402
from plugbridge.memory.predict import Trace, predict  # noqa: E402
from plugbridge.memory.rates import measure_rates  # noqa: E402
from plugbridge.memory.steps import MakeStep  # noqa: E402
from plugbridge.memory.warm import warm_up  # noqa: E402
from plugbridge.models import MODEL_CLASS  # noqa: E402
from plugbridge.shrink.packing import make_packed, matrices_of, packed_weights  # noqa: E402
from plugbridge.tasks.encode import Encoded  # noqa: E402
from plugbridge.tensors.packed import Bits  # noqa: E402
from plugbridge.transfer.coupling import Coupling  # noqa: E402
from plugbridge.transfer.fidelity import Fidelity, WaysBack, fidelity  # noqa: E402
from plugbridge.workers import apart, workers  # noqa: E402

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# tests kill processes, not machines: what the system holds of a file is there for the next process
os.fsync = lambda _file: None
_normal = torch.nn.init._no_grad_normal_


def _drawn(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    """First values; a model without weights needs none, and torch takes as long as over real ones."""
    return tensor if tensor.device.type == "meta" else _normal(tensor, *given, **named)


torch.nn.init._no_grad_normal_ = _drawn

_freeze = gc.freeze
_freeze()
gc.enable()
gc.freeze = gc.unfreeze = lambda: None  # our own code's: what is frozen here and below stays so


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Leave what is there before a file's tests out of every search for garbage.

    Runs collect garbage at every stage and predictions for every trace, and each time half a million of the libraries'
    objects would be looked through.
    """
    gc.collect()
    _freeze()


@pytest.fixture(autouse=True)
def log_as_at_first() -> None:
    """Nothing prints or silences our log because of a command that an earlier test, or a fixture of its file, ran."""
    ours = logging.getLogger("plugbridge")
    ours.handlers.clear()
    ours.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that is interrupted ignores what signals come after it; the next test, and its processes, do not."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def predictions_once() -> Iterator[None]:
    """Plans and memory benches of equal steps are predicted once a session, as they are once a plan.

    So is what they measure of the machine: nothing that is tested depends on how fast it is just now.
    """
    known: dict[tuple[MakeStep, str], Trace] = {}

    def once(case: Case, make: MakeStep) -> Trace:
        key = make, repr(case)
        if key not in known:
            known[key] = predict(case, make)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plugbridge.plan.predictions.predict", once)
        patch.setattr("plugbridge.bench.memory.predict", once)
        patch.setattr("plugbridge.memory.rates.measure_rates", functools.cache(measure_rates))
        patch.setattr("plugbridge.plan.make.warm_up", functools.cache(warm_up))
        yield


@pytest.fixture(scope="session", autouse=True)
def fidelity_of_few_rows() -> Iterator[None]:
    """Runs compare gradients on two rows at most, not on the eight of the default: half of a toy coupling's time."""

    def few(coupling: Coupling, ways: WaysBack, rows: Sequence[Encoded], step: int, at_once: int) -> Fidelity:
        return fidelity(coupling, ways, rows[:2], step, at_once)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plugbridge.stages.couple.fidelity", few)
        yield


class ReadOnce:
    """Reads the models of folders that no test changes once, and copies them from then on: a fifth of the time."""

    folders: ClassVar[set[str]] = set()

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._known: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def from_pretrained(self, source: str, **given: Any) -> Any:
        if source not in self.folders or "quantization_config" in given:
            return self._reader.from_pretrained(source, **given)
        key = (source, *(str(given[name]) for name in ("dtype", "device_map", "attn_implementation")))
        if key not in self._known:
            self._known[key] = self._reader.from_pretrained(source, **given)
        return copy.deepcopy(self._known[key])


@pytest.fixture(scope="session", autouse=True)
def models_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kind, reader in MODEL_CLASS.items():
            patch.setitem(MODEL_CLASS, kind, ReadOnce(reader))
        yield


WORDS = [f"w{i}" for i in range(24)]
LABELS = ["yes", "no"]
VOCAB = ["<pad>", "</s>", "<unk>", *LABELS, "is", "it", ":", *WORDS]

FAMILIES = ("gpt2", "t5", "t5-gated", "llama")
PAPER_FAMILIES = ("gpt2", "t5", "t5-gated")
METHODS = ("lora", "adapter", "prefix")


def pairwise(first: Sequence[str], second: Sequence[str], third: Sequence[Any]) -> list[tuple[str, str, Any]]:
    """Every pair of values of three settings at least once; the third, in turns, has the fewest values."""
    assert len(third) <= min(len(first), len(second))
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def make_tokenizer(words: list[str] = VOCAB) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(family: str, hidden: int = 16, layers: int = 2, heads: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random model; weights are scaled up so that every part matters to the logits. A copy takes half the time."""
    model, state = _made(family, hidden, layers, heads, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _made(family: str, hidden: int, layers: int, heads: int, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, and the generator's state after it."""
    torch.manual_seed(seed)
    vocab = len(VOCAB)
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    if family == "gpt2":
        config: Any = GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=32, **ends)
        model: PreTrainedModel = GPT2LMHeadModel(config)
    elif family == "llama":
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), max_position_embeddings=32,
            tie_word_embeddings=False, **ends,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        gated = family == "t5-gated"
        config = T5Config(
            vocab_size=vocab, d_model=hidden, d_kv=4, d_ff=2 * hidden, num_layers=layers,
            num_decoder_layers=layers, num_heads=heads, relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=not gated,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.6 if "embed" in name or "wte" in name or "shared" in name else 0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(mean=1.0, std=0.1)
    return model.eval(), torch.get_rng_state()


def token_inputs(model: Any, rows: int = 3, length: int = 7, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random tokens for a model of either kind; the last row is padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, len(VOCAB), (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model.config.model_type == "t5":
        inputs["labels"] = torch.randint(3, len(VOCAB), (rows, 3), generator=generator)
    return inputs


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Logits where the attention mask is one (all of them for a decoder)."""
    inputs = token_inputs(model)
    logits: torch.Tensor = model(**inputs).logits
    return logits if "labels" in inputs else logits[inputs["attention_mask"].bool()]


@pytest.fixture(scope="session")
def clean() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Have work done by a copy of a process that has imported everything and computed nothing. Linux only."""
    with workers(1) as pool:
        yield lambda work: pool.submit(apart, work).result()


def second_peak(load: Callable[[], Any]) -> int:
    """Bytes that a second loading of a model takes, in a process of its own."""
    return_blocks()
    load()
    settle()
    with measure("cpu") as cost:
        loaded = load()
    del loaded
    return cost.peak_bytes


@torch.no_grad()
def pack_model(model: PreTrainedModel, layout: Layout, bits: Bits) -> None:
    """Pack the matrices of a model's blocks in place, rounded to nearest, as `prune` does on the way to disk."""
    weights = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    paths = matrices_of(model, layout)
    make_packed(model, paths, bits, "out in")
    for name, tensor in packed_weights(weights, paths, bits, layout.family.linear == "in out"):
        model.get_parameter(name).data = tensor


@torch.no_grad()
def randomise(model: torch.nn.Module, std: float = 0.3, seed: int = 11) -> None:
    """Give everything that trains random values, so that nothing is at its no-op start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def save_model(family: str, path: Path, words: list[str] = VOCAB, **shape: int) -> Path:
    make_model(family, **shape).save_pretrained(path)
    make_tokenizer(words).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A (small, large) pair of model directories of a family, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def pair(family: str) -> tuple[Path, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            made[family] = (
                save_model(family, root / "small", hidden=8, layers=1, heads=2, seed=1),
                save_model(family, root / "large", hidden=16, layers=3, heads=4, seed=2),
            )
            ReadOnce.folders.update(map(str, made[family]))
        return made[family]

    return pair


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model directory of a family in several shards, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_model(family, layers=3, seed=3).save_pretrained(made[family], max_shard_size="6KB")
        return made[family]

    return folder


def toy_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Is the word's number even? Learnable by a tiny model from the word alone; the seed tells the word before it."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(WORDS), (count,), generator=generator).tolist()
    before = [WORDS[(8 * seed + i % 8) % len(WORDS)] for i in range(count)]
    parity = ("even", "odd")
    return [{"word": f"w{n}", "label": parity[n % 2], "before": word} for n, word in zip(numbers, before, strict=True)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `task:` table of a toy task on disk."""
    root = tmp_path_factory.mktemp("toy")
    sizes = {"train": 40, "validation": 10, "test": 30}
    files = {
        split: str(write_jsonl(root / f"{split}.jsonl", toy_rows(count, i)))
        for i, (split, count) in enumerate(sizes.items())
    }
    return {**files, "prompt": "{before} is it : {word}", "words": {"even": " yes", "odd": " no"}}


@pytest.fixture
def run_config(pairs: Callable[[str], tuple[Path, Path]], toy: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A small run's configuration as a dict."""

    def build(family: str = "gpt2", method: str = "lora", **changes: Any) -> dict[str, Any]:
        small, large = pairs(family)
        train = {"steps": 4, "batch_size": 4, "checkpoint_every": 1}
        config: dict[str, Any] = {
            "small": str(small),
            "large": str(large),
            "task": toy,
            "method": {"name": method, "rank": 2},
            "tune": dict(train),
            "score": {"samples": 6},
            "prune": {"reduction": 2},
            "couple": dict(train),
            "ceiling": dict(train),
            "evaluate": {"batch_size": 8},
            "device": "cpu",
        }
        config.update(changes)
        return config

    return build


def data_directory() -> Path:
    """The directory of real task files; skips the test where there is none."""
    value = os.environ.get("PLUGBRIDGE_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("PLUGBRIDGE_DATA names no directory of task files")
    return Path(value)
