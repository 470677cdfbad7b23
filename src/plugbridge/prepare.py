"""Everything a run depends on, read and checked before anything is written."""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from plugbridge.config import RunConfig, TaskConfig
from plugbridge.cost import free_memory
from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout
from plugbridge.folders import model_digest
from plugbridge.models import (
    Tokenizer,
    check_pair,
    check_precision,
    check_same_tokenizer,
    check_vocabulary,
    find_checkpoint,
    layout_for,
    load_config,
    load_model,
    load_tokenizer,
    parameter_count,
    pick_device,
    pick_dtype,
    positions_of,
)
from plugbridge.preflight import Checked, most_of, preflight, room_in
from plugbridge.quantised import check_load_in, load_quantised
from plugbridge.shrink.sizes import budgeted_sizes, reduced_sizes
from plugbridge.streaming import load_converted, load_streamed
from plugbridge.tasks.alike import encode_alike, same_encoder
from plugbridge.tasks.encode import Encoded, Encoder, front_of
from plugbridge.tasks.remarks import Cut, cut_of, remarks
from plugbridge.tasks.spec import SPLITS, Split, Task
from plugbridge.tensors.checkpoint import Checkpoint
from plugbridge.transfer.couple import find_mode
from plugbridge.tuners.table import Method, MethodSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run's checked inputs: rows in tokens, the method, the digests of all input files."""

    config: RunConfig
    task: Task
    method: Method
    settings: MethodSettings
    encoder: Encoder
    large_encoder: Encoder
    rows: dict[Split, list[Encoded]]
    large_rows: dict[Split, list[Encoded]]
    device: str
    dtype: torch.dtype
    inputs: dict[str, Any]
    streamed: Checkpoint | None
    """The large model's weights on disk; None where it is in memory as a whole."""
    checkpoints: Mapping[str, Checkpoint]
    """Both models' safetensors files as they were found, by source."""
    without_weights: Mapping[str, tuple[PreTrainedModel, Layout]]
    """Both models on `meta`, names and shapes alone, with their layouts, by source."""
    said: tuple[str, ...] = ()
    """What a reader of the results should know of the rows, a line each."""

    @property
    def large_bytes(self) -> int:
        """Bytes of the large model's safetensors files; 0 where its weights are in another format."""
        checkpoint = self.checkpoints.get(self.config.large_path)
        return 0 if checkpoint is None else checkpoint.nbytes

    def cut(self) -> dict[str, dict[Split, Cut]]:
        """What was cut of the rows of each split, by model."""
        models = {"small": self.rows, "large": self.large_rows}
        return {name: {split: cut_of(found) for split, found in rows.items()} for name, rows in models.items()}

    def shared(self) -> tuple[Encoder, dict[Split, list[Encoded]]]:
        """An encoder and the rows that both models can read: those of the model with fewer positions."""
        narrower = (self.encoder.positions or math.inf) <= (self.large_encoder.positions or math.inf)
        return (self.encoder, self.rows) if narrower else (self.large_encoder, self.large_rows)

    def require_unchanged(self) -> None:
        """Raise ModelError if a model's files have changed: the memory of one on the CPU may be its files'."""
        for checkpoint in self.checkpoints.values():
            checkpoint.require_unchanged()

    def load(self, source: str) -> tuple[PreTrainedModel, Layout]:
        """Load a model and meet it with its family. Raises ModelError if its files have changed since the start."""
        checkpoint, asked = self.checkpoints.get(source), self._as_asked()
        with self._unchanged(source):
            model = load_converted(source, checkpoint, **asked) if checkpoint is not None else None
            if model is None:
                model = load_model(source, **asked)
        return model, layout_for(model)

    def _as_asked(self) -> dict[str, Any]:
        """How every model is loaded."""
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.config.trust_remote_code}

    @contextmanager
    def _unchanged(self, source: str) -> Generator[None]:
        """Files are the same before and after the block."""
        checkpoint = self.checkpoints.get(source)
        if checkpoint is not None:
            checkpoint.require_unchanged()
        yield
        if checkpoint is not None:
            checkpoint.require_unchanged()

    def load_large(self) -> tuple[PreTrainedModel, Layout]:
        """The large model with full weights, not to be trained: streamed from disk or in memory."""
        config = self.config
        if self.streamed is not None:
            return load_streamed(config.large_path, self.streamed, **self._as_asked())
        model, layout = self.load(config.large_path)
        return model.requires_grad_(False), layout

    def load_to_fit(self) -> tuple[PreTrainedModel, Layout]:
        """The large model only to be fitted with a module, not to be run: its blocks stay on disk where they can."""
        checkpoint = self.checkpoints.get(self.config.large_path)
        if checkpoint is None:
            return self.load_run_only()
        return load_streamed(self.config.large_path, checkpoint, **self._as_asked())

    def load_run_only(self) -> tuple[PreTrainedModel, Layout]:
        """The large model for forward passes: quantised where the configuration says so."""
        config = self.config
        if config.load_in is None:
            return self.load_large()
        with self._unchanged(config.large_path):
            checkpoint = self.checkpoints.get(config.large_path)
            model, layout = load_quantised(config.large_path, config.load_in, **self._as_asked(), checkpoint=checkpoint)
        return model.requires_grad_(False), layout


def prepare(config: RunConfig, data: Path | None, before: Prepared | None = None) -> Prepared:
    """Read and check everything a run depends on; writes nothing.

    Rows that a run `before` has in the same tokens are taken from it. Raises ConfigError, ModelError or DataError, each
    a single line.
    """
    return prepare_checked(preflight(config, data), before)


def prepare_checked(checked: Checked, before: Prepared | None = None) -> Prepared:
    """Go on from what was checked before torch was imported: tokenizers, rows in tokens, weights' names and shapes.

    Rows that a run `before` has in the same tokens are taken from it. Raises ConfigError, ModelError or DataError, each
    a single line.
    """
    config, task, kind = checked.config, checked.task, checked.kind
    device = pick_device(config.device)
    remote = config.trust_remote_code
    small, large = (load_config(source, trust_remote_code=remote) for source in (config.small, config.large_path))
    check_pair(small, large)
    tokenizers: list[Tokenizer] = [
        load_tokenizer(source, trust_remote_code=remote) for source in (config.small, config.large_path)
    ]
    check_same_tokenizer(*tokenizers)
    for source, tokenizer, model in zip((config.small, config.large_path), tokenizers, (small, large), strict=True):
        check_vocabulary(source, tokenizer, model)
    checkpoints, without_weights, streams = _check_weights(config, device)
    encoders = [
        Encoder(tokenizer, kind, room_in(config, positions_of(model)), config.special_tokens)
        for tokenizer, model in zip(tokenizers, (small, large), strict=True)
    ]
    rows: dict[Split, list[Encoded]]
    large_rows: dict[Split, list[Encoded]]
    if before is not None and _reads_the_same(before, checked, encoders):
        rows, large_rows = before.rows, before.large_rows
    else:
        form = task.form(kind)
        rows = {s: encoders[0].encode_all(task, form, checked.rows[s]) for s in SPLITS}
        large_rows = {s: encode_alike(task, form, checked.rows[s], rows[s], *encoders) for s in SPLITS}
    said = [*checked.said, *_without_effect(config, encoders, (small, large), rows), *remarks(task, encoders[0], rows)]
    said += [f"large: {line}" for line in remarks(task, encoders[1], large_rows) if line not in said]
    for line in said:
        log.warning("%s", line)
    if checked.idle is not None:
        log.info("%s", checked.idle)
    return Prepared(
        config=config,
        task=task,
        method=checked.method,
        settings=checked.settings,
        encoder=encoders[0],
        large_encoder=encoders[1],
        rows=rows,
        large_rows=large_rows,
        device=device,
        dtype=pick_dtype(config.dtype),
        inputs={
            "small": model_digest(config.small, remote),
            "large": model_digest(config.large_path, remote),
            "task": {
                "spec": task.model_dump(mode="json"),
                "files": dict(checked.digests),
                **most_of(config),
                **_read(encoders[0], rows, large_rows),
            },
        },
        streamed=checkpoints[config.large_path] if streams else None,
        checkpoints=checkpoints,
        without_weights=without_weights,
        said=tuple(said),
    )


def _reads_the_same(before: Prepared, checked: Checked, encoders: Sequence[Encoder]) -> bool:
    """Whether a run before this one has its rows, and encoders that make the same tokens of them."""
    pairs = zip((before.encoder, before.large_encoder), encoders, strict=True)
    return (
        before.task == checked.task
        and all([row.row for row in before.rows[split]] == checked.rows[split] for split in SPLITS)
        and all(same_encoder(one, other) for one, other in pairs)
    )


def _without_effect(
    config: RunConfig,
    encoders: Sequence[Encoder],
    models: Sequence[PreTrainedConfig],
    rows: Mapping[Split, Sequence[Encoded]],
) -> Generator[str]:
    """Settings of which only tokenizers, models and rows tell that they change nothing, a line each."""
    if not config.special_tokens and not any(front_of(encoder.tokenizer) for encoder in encoders):
        yield "special_tokens is false, which changes nothing: the tokenizer puts none in front of a text"
    rooms = [room_in(config.model_copy(update={"max_length": None}), positions_of(model)) for model in models]
    if config.max_length is not None and all(room is not None and room <= config.max_length for room in rooms):
        yield (
            f"max_length is {config.max_length:,}, which changes nothing: the models' positions hold "
            f"{max(room for room in rooms if room is not None):,} tokens of a row"
        )
    task = config.task
    own = isinstance(task, TaskConfig) and task.score not in (None, "mean" if task.words is None else "sum")
    if isinstance(task, TaskConfig) and own and all(row.bare for found in rows.values() for row in found):
        yield f"task.score is {task.score}, which changes nothing: all options are single tokens"


def _check_weights(
    config: RunConfig, device: str
) -> tuple[dict[str, Checkpoint], dict[str, tuple[PreTrainedModel, Layout]], bool]:
    """Read both models' names and shapes, no weight: a broken checkpoint is refused before any work.

    Returns their weights on disk, where those are safetensors, the models without them, and whether the large model
    shall be streamed.
    """
    found = {source: find_checkpoint(source) for source in (config.small, config.large_path)}
    empty = {source: load_model(source, device="meta", trust_remote_code=config.trust_remote_code) for source in found}
    for source, model in empty.items():
        check_precision(source, model, found[source])
    without_weights = {source: (model, layout_for(model)) for source, model in empty.items()}
    large, layout = without_weights[config.large_path]
    bridge_sizes(config, large, layout)
    if config.load_in is not None:
        check_load_in(config.large_path, large, layout, config.load_in, device)
    streams = _streams(config, found[config.large_path], parameter_count(large), device)
    checkpoints = {source: checkpoint for source, checkpoint in found.items() if checkpoint is not None}
    return checkpoints, without_weights, streams


def _streams(config: RunConfig, checkpoint: Checkpoint | None, parameters: int, device: str) -> bool:
    """Whether the large model shall stay on disk. Raises ModelError where it shall and cannot."""
    if not wants_streaming(config, parameters, free_memory(device)):
        return False
    if checkpoint is None and config.resident == "none":
        raise ModelError(
            f"resident is 'none', but {config.large_path} has no safetensors weights to stream; convert them with "
            "save_pretrained of transformers, or use resident: all"
        )
    if checkpoint is None:
        log.warning("%s takes half of the free memory or more, but without safetensors weights it is loaded as a whole",
                    config.large_path)  # fmt: skip
    else:
        checkpoint.require_readable()
        size = parameters * pick_dtype(config.dtype).itemsize
        log.info("%s stays on disk: its weights take %.1f GB", config.large_path, size / 1e9)
    return checkpoint is not None


def wants_streaming(config: RunConfig, parameters: int, free: int) -> bool:
    """Whether a large model of so many parameters shall stay on disk where the device has `free` bytes free."""
    need = parameters * pick_dtype(config.dtype).itemsize
    return config.resident == "none" or (config.resident == "auto" and need > free / 2)


def bridge_sizes(config: RunConfig, large: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """The Bridge's axis sizes that a configuration asks for. Raises ConfigError if there is none such.

    A budget is for what the mode has in memory: without embeddings and head where the Bridge reads no tokens.
    """
    if config.prune.reduction is not None:
        return reduced_sizes(layout, config.prune.reduction, config.prune.whole)
    asked = config.prune.budget or 0.0
    names = {name for name, _ in large.named_parameters()}
    if not find_mode(config.couple.mode).reads_tokens:
        names -= layout.vocabulary()
    budget = int(asked * parameter_count(large)) if asked < 1 else int(asked)
    return budgeted_sizes(layout, names, budget, config.prune.whole)


def _read(encoder: Encoder, *read: Mapping[Split, Sequence[Encoded]]) -> dict[str, Any]:
    """How rows are read where that is not as it stands: what prompts begin with, that some were cut, end marks."""
    front: dict[str, Any] = {"front": list(encoder.front)} if encoder.front else {}
    if encoder.kind == "seq2seq" and any(row.bare for rows in read for found in rows.values() for row in found):
        front["end_mark"] = "not behind single tokens"  # earlier versions trained it all the same
    cut = any(row.kept < 1 for rows in read for found in rows.values() for row in found)
    return {**front, **({"cut": "tokens"} if cut else {})}
