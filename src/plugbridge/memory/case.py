"""What a training step is about: a model's shape, its rows, a method, a Bridge."""

import copy
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from plugbridge.config import LoadIn
from plugbridge.config.stages import Activations, OptimizerName, PackBits
from plugbridge.families.spec import Family, Layout, family_of
from plugbridge.memory.alive import note_read
from plugbridge.models import MODEL_CLASS, find_checkpoint, layout_for
from plugbridge.shrink.importance import Importance, scope_key
from plugbridge.shrink.prune import BridgePlan
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.streaming import load_streamed, stream_blocks
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tensors.patterns import axis_names
from plugbridge.transfer.down import DownKind
from plugbridge.transfer.kept import KeptBits
from plugbridge.transfer.repair import RepairTarget
from plugbridge.tuners.table import METHODS, Method, MethodSettings

DEFAULT = MethodSettings(8, 16.0)
MADE_UP = {"scales": 56, "top": 0.01}
"""Values of a made-up packed matrix's scales, of which 56 is 1 in eight bits: small, and not zero, as no error is."""
TARGETS = {"causal": 1, "seq2seq": 2}
"""Tokens of a row's answer: a label word, of a seq2seq model one of two tokens or more with its end mark."""


@dataclass
class Blank:
    """A tokenizer for rows that are tokens already."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 0
    unk_token_id: int | None = None

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return []

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str | list[str]:
        return ""

    def save_pretrained(self, save_directory: str) -> None:
        return None


class AtOnce(Executor):
    """Runs what it is given on the caller's thread, where a trace counts it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class Case:
    """Everything a step's memory depends on; no weights.

    `config` is the shape of the model, `trained` the layers of each stack, from the top, that hold modules which
    train (all where a stack is not named), `sizes` the Bridge's axis sizes (or `reduction` where there are none).
    Rows are `length` tokens; batches have `batch` of them. `channels` says whether the Bridge's residual stream is
    projected or selected, `bits` how weights are held that neither train nor are scored. A `streamed` model has one
    block in memory and one read ahead, from the directory `weights`, or made up where there is none; where it is
    scored, the states of `at_once` rows are in memory, or none of them (0: they are on disk). Training steps go through
    the models `micro_batch` rows at a time, all rows where it is None; `later` are rows that go through after others
    of their step, whose gradients are in memory; where they go `together`, all of them pass one block before the next,
    and their states are in memory. The step ends with the `optimizer`'s. Coupling starts from a module of
    `small`'s shape behind a plug, or without one from a fresh module. `target` is what a repair fits, `down`
    whether coupling trains the way down. The Bridge's matrices are of `packed` bits, and its error passes the
    `activations` of the Bridge or of the large model, the latter kept in `kept_bits`. With `bridge_streamed` a block of
    the Bridge is in memory, and one read ahead.
    """

    config: PreTrainedConfig
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    method: Method = METHODS["lora"]
    settings: MethodSettings = DEFAULT
    trained: Mapping[str, int] = field(default_factory=dict[str, int])
    sizes: Mapping[str, int] | None = None
    reduction: float = 16
    channels: str = "select"
    importance: Importance = "fisher"
    bits: LoadIn | None = None
    train_bridge: bool = True
    recompute: bool = True
    device: str = "cpu"
    streamed: bool = False
    weights: str | None = None
    at_once: int = 1
    micro_batch: int | None = None
    later: bool = False
    together: bool = False
    optimizer: OptimizerName = "adamw"
    small: PreTrainedConfig | None = None
    target: RepairTarget = "response"
    down: DownKind = "select"
    packed: PackBits = 16
    activations: Activations = "bridge"
    kept_bits: KeptBits | None = None
    bridge_streamed: bool = False

    @property
    def reads_files(self) -> bool:
        """Whether the model's weights are read from a directory: block by block, or as they are quantised."""
        return self.streamed or self.bits is not None

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.config.model_type)

    @property
    def kind(self) -> str:
        """``causal`` or ``seq2seq``."""
        return self.family.kind

    @property
    def layers(self) -> dict[str, int]:
        """Layers by stack."""
        return {name: int(getattr(self.config, stack.layers)) for name, stack in self.family.stack.items()}

    @property
    def encoder(self) -> Encoder:
        """An encoder for rows that are tokens already."""
        return Encoder(Blank(), self.kind, None)

    def rows(self, count: int | None = None) -> list[Encoded]:
        """Full-length rows of random tokens; `batch` of them unless told."""
        targets, vocabulary = TARGETS[self.kind], int(self.config.vocab_size)
        prompt = self.length - targets if self.kind == "causal" else self.length
        chosen = random.Random(0)  # not torch's: this runs where tensors are fake, too
        ids = [chosen.choices(range(1, vocabulary), k=prompt) for _ in range(self.batch if count is None else count)]
        return [Encoded(tuple(row), ((1,) * targets, (2,) * targets), 0) for row in ids]

    def with_layers(self, layers: Mapping[str, int], trained: Mapping[str, int]) -> "Case":
        """The same with other depths."""
        config = copy.deepcopy(self.config)
        for name, count in layers.items():
            setattr(config, self.family.stack[name].layers, count)
        for per_layer in ("layer_types",):  # lists that transformers makes for every layer
            if getattr(config, per_layer, None) is not None:
                setattr(config, per_layer, getattr(config, per_layer)[: max(layers.values())])
        return replace(self, config=config, trained=dict(trained))

    def alone(self) -> "Case":
        """The same without what concerns only a Bridge and what trains: equal wherever nothing else differs."""
        return replace(
            self, trained={}, sizes=None, train_bridge=True, recompute=True, micro_batch=None, together=False,
            optimizer="adamw", target="response", down="select", packed=16, activations="bridge", kept_bits=None,
            bridge_streamed=False,
        )  # fmt: skip

    def shorter(self, batch: int, length: int) -> "Case":
        """The same with other rows."""
        return replace(self, batch=batch, length=length)

    def build(self) -> tuple[PreTrainedModel, Layout]:
        """The model with random weights, in evaluation mode, and its layout."""
        if self.streamed and self.weights is not None:
            checkpoint = find_checkpoint(self.weights)
            assert checkpoint is not None
            return load_streamed(self.weights, checkpoint, dtype=self.dtype, device=self.device)
        if self.streamed:
            model, layout = self.on_meta()
            self.stream(model, layout)
            return model, layout
        return self._made(self.device)

    def stream(self, model: PreTrainedModel, layout: Layout) -> None:
        """Have a model on `meta` read its blocks from nowhere."""
        stream_blocks(model, layout, self.device, self._made_up, AtOnce())

    def on_meta(self) -> tuple[PreTrainedModel, Layout]:
        """The model without weights."""
        return self._made("meta")

    def _made(self, device: str) -> tuple[PreTrainedModel, Layout]:
        implementation = "sdpa" if self.kind == "causal" else None  # as models are loaded
        with torch.device(device):
            built: Any = MODEL_CLASS[self.kind].from_config(
                self.config, dtype=self.dtype, attn_implementation=implementation
            )
        model = cast(PreTrainedModel, built).eval()
        return model, layout_for(model)

    def _made_up(self, names: list[str], like: Tensor) -> Callable[[], Tensor]:
        value = MADE_UP.get(names[0].rpartition(".")[2], 0)
        return lambda: note_read(torch.full(like.shape, value, dtype=like.dtype, device=self.device))

    def plan(self, layout: Layout) -> BridgePlan:
        """A Bridge's plan that keeps the first units; a projection keeps the first directions."""
        sizes = dict(self.sizes) if self.sizes is not None else reduced_sizes(layout, self.reduction)
        keep = {key: torch.arange(sizes[key.partition("@")[0]]) for key in scored(layout)}
        basis: dict[str, Tensor] = {}
        if self.channels != "select":
            basis["hidden"] = torch.eye(sizes["hidden"], layout.sizes["hidden"])
        return BridgePlan(sizes, keep, basis)


def scored(layout: Layout) -> dict[str, int]:
    """Sizes of all axes that are scored, by their keys."""
    found: dict[str, int] = {}
    for weight in layout.weights():
        for axis in axis_names(weight.pattern):
            key = scope_key(layout, axis, weight.place)
            if key is not None:
                found[key] = layout.sizes[axis]
    return found
