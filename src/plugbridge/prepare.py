"""Everything a run depends on, read and checked before anything is written."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plugbridge.config import BaselinesConfig, RunConfig, TaskConfig
from plugbridge.cost import free_memory
from plugbridge.errors import ConfigError, ModelError
from plugbridge.families.spec import Layout, family_of
from plugbridge.files import file_digest
from plugbridge.models import (
    Tokenizer,
    check_pair,
    check_same_tokenizer,
    check_vocabulary,
    find_checkpoint,
    layout_for,
    load_config,
    load_model,
    load_tokenizer,
    model_files,
    parameter_count,
    pick_device,
    pick_dtype,
    positions_of,
)
from plugbridge.quantised import check_load_in, load_quantised
from plugbridge.shrink.prune import budgeted_sizes, reduced_sizes
from plugbridge.streaming import load_converted, load_streamed
from plugbridge.tasks.alike import encode_alike
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.hub import from_hub, hub_rows
from plugbridge.tasks.metrics import check_metrics
from plugbridge.tasks.own import own_rows, own_task
from plugbridge.tasks.rows import input_files, load_rows
from plugbridge.tasks.spec import SPLITS, Split, Task, load_task
from plugbridge.tensors.checkpoint import Checkpoint
from plugbridge.transfer.couple import find_mode
from plugbridge.tuners.table import Method, MethodSettings, find_method

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

    @property
    def large_bytes(self) -> int:
        """Bytes of the large model's safetensors files; 0 where its weights are in another format."""
        checkpoint = self.checkpoints.get(self.config.large_path)
        return 0 if checkpoint is None else checkpoint.nbytes

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


def prepare(config: RunConfig, data: Path | None) -> Prepared:
    """Read and check everything a run depends on; writes nothing.

    Raises ConfigError, ModelError or DataError, each a single line.
    """
    method = find_method(config.method.name)
    config = resolve(config)
    check_settings(config)
    rank = config.method.rank if config.method.rank is not None else method.rank
    alpha = config.method.alpha if config.method.alpha is not None else 2.0 * rank
    device = pick_device(config.device)
    remote = config.trust_remote_code
    small, large = (load_config(source, trust_remote_code=remote) for source in (config.small, config.large_path))
    check_pair(small, large)
    kind = family_of(large.model_type).kind
    tokenizers: list[Tokenizer] = [
        load_tokenizer(source, trust_remote_code=remote) for source in (config.small, config.large_path)
    ]
    check_same_tokenizer(*tokenizers)
    for source, tokenizer, model in zip((config.small, config.large_path), tokenizers, (small, large), strict=True):
        check_vocabulary(source, tokenizer, model)
    checkpoints, streams = _check_weights(config, device)
    encoders = [
        Encoder(tokenizer, kind, room_in(config, positions_of(model)))
        for tokenizer, model in zip(tokenizers, (small, large), strict=True)
    ]
    task, texts, digests = _read_task(config, data, kind)
    check_metrics(task.metrics)
    check_probe(config, task, kind)
    form = task.form(kind)
    rows: dict[Split, list[Encoded]] = {split: encoders[0].encode_all(task, form, texts[split]) for split in SPLITS}
    large_rows: dict[Split, list[Encoded]] = {
        split: encode_alike(task, form, texts[split], rows[split], *encoders) for split in SPLITS
    }
    return Prepared(
        config=config,
        task=task,
        method=method,
        settings=MethodSettings(rank, alpha, config.method.dropout),
        encoder=encoders[0],
        large_encoder=encoders[1],
        rows=rows,
        large_rows=large_rows,
        device=device,
        dtype=pick_dtype(config.dtype),
        inputs={
            "small": _model_digest(config, config.small),
            "large": _model_digest(config, config.large_path),
            "task": {"spec": task.model_dump(mode="json"), "files": digests, **_most(config)},
        },
        streamed=checkpoints[config.large_path] if streams else None,
        checkpoints=checkpoints,
    )


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the coupling mode's defaults written out. Raises ConfigError."""
    mode = find_mode(config.couple.mode)
    trains = mode.trains_bridge and config.couple.bridge == "train" and config.couple.steps > 0
    optimizer = mode.optimizer if trains else "adamw"
    chosen: dict[str, Any] = {
        "optimizer": config.couple.optimizer if config.couple.optimizer is not None else optimizer,
        "plug": config.couple.plug if config.couple.plug is not None else mode.plug,
        "layers": config.couple.layers if config.couple.layers is not None else mode.layers,
    }
    channels = config.prune.channels
    if channels == "auto":
        projected = "gradient_pca" if config.score.importance == "fisher" else "pca"
        channels = "select" if mode.reads_alone else projected
    return config.model_copy(
        update={
            "couple": config.couple.model_copy(update=chosen),
            "prune": config.prune.model_copy(update={"channels": channels}),
        }
    )


def check_settings(config: RunConfig) -> None:
    """Refuse what does not go together, once the mode's defaults are written out (`resolve`). Raises ConfigError."""
    _check_bridge_use(config)
    _check_models(config)
    if config.method.name != "lora" and config.method.dropout > 0:
        raise ConfigError(f"method.dropout is {config.method.dropout}, but only lora has dropout; set it to 0")


def check_probe(config: RunConfig, task: Task, kind: str) -> None:
    """Refuse a probe of a task whose answers such models write. Raises ConfigError."""
    if config.evaluate.probe and task.form(kind).generate is not None:
        raise ConfigError(
            f"evaluate.probe chooses among options, but in task '{task.name}' {kind} models write their answers; "
            "set it to false"
        )


def _check_bridge_use(config: RunConfig) -> None:
    if config.resident == "none" and config.load_in is not None:
        raise ConfigError(
            f"resident is 'none', but large.load_in '{config.load_in}' keeps quantised weights on the device; "
            "use one of the two"
        )
    mode, channels = find_mode(config.couple.mode), config.prune.channels
    if mode.reads_alone and channels != "select":
        raise ConfigError(
            f"prune.channels is '{channels}', but in mode '{mode.name}' the Bridge must be a model by itself; "
            "use channels: select"
        )
    if config.couple.cache != "off" and not mode.caches:
        raise ConfigError(
            f"couple.cache is '{config.couple.cache}', but mode '{mode.name}' keeps no activations; leave it off"
        )
    if config.couple.layer_map != "uniform" and config.couple.plug == "fresh":
        raise ConfigError("couple.layer_map maps small layers, but a fresh start takes none; use plug: random or ridge")
    if config.couple.down == "learned" and mode.name in ("feedback", "identity"):
        raise ConfigError(
            f"couple.down is 'learned', but in mode '{mode.name}' no loss goes through down; use down: select, and a "
            "`repair:` section to fit the Bridge"
        )
    if channels == "gradient_pca" and config.score.importance != "fisher":
        raise ConfigError(
            f"prune.channels is 'gradient_pca', but score.importance '{config.score.importance}' takes no gradients; "
            "use importance: fisher, or channels: pca"
        )


def _check_models(config: RunConfig) -> None:
    probe = (config.evaluate.probe, "evaluate.probe: true")
    needs = {
        "large_tuned": (config.ceiling is not None, "a `ceiling:` section"),
        "large_probe": probe,
        "small_probe": probe,
    }
    for name in BaselinesConfig.model_fields:
        needs[name] = (getattr(config.baselines, name) is not None, f"a `baselines.{name}:` section")
    for name in config.evaluate.models or ():
        given, section = needs.get(name, (True, ""))
        if not given:
            raise ConfigError(f"evaluate.models names '{name}', which needs {section}")


def _check_weights(config: RunConfig, device: str) -> tuple[dict[str, Checkpoint], bool]:
    """Read both models' names and shapes, no weight: a broken checkpoint is refused before any work.

    Returns their weights on disk, where those are safetensors, and whether the large model shall be streamed.
    """
    found = {source: find_checkpoint(source) for source in (config.small, config.large_path)}
    small, large = (
        load_model(source, device="meta", trust_remote_code=config.trust_remote_code)
        for source in (config.small, config.large_path)
    )
    layout_for(small)
    layout = layout_for(large)
    bridge_sizes(config, large, layout)
    if config.load_in is not None:
        check_load_in(config.large_path, large, layout, config.load_in, device)
    streams = _streams(config, found[config.large_path], parameter_count(large), device)
    return {source: checkpoint for source, checkpoint in found.items() if checkpoint is not None}, streams


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
        return reduced_sizes(layout, config.prune.reduction)
    asked = config.prune.budget or 0.0
    names = {name for name, _ in large.named_parameters()}
    if not find_mode(config.couple.mode).reads_tokens:
        names -= layout.vocabulary()
    return budgeted_sizes(layout, names, int(asked * parameter_count(large)) if asked < 1 else int(asked))


def room_in(config: RunConfig, positions: int | None) -> int | None:
    """Tokens that a row may have: what a model's positions leave, and no more than was asked for."""
    method = find_method(config.method.name)
    rank = config.method.rank if config.method.rank is not None else method.rank
    reserved = rank if method.stacked else 0  # a prefix takes positions of its own
    limits = [] if positions is None else [positions - reserved]
    return min([*limits, *([] if config.max_length is None else [config.max_length])], default=None)


def _most(config: RunConfig) -> dict[str, int]:
    return {} if config.max_length is None else {"max_length": config.max_length}


def _model_digest(config: RunConfig, source: str) -> dict[str, Any]:
    """What makes a model: its configuration, tokenizer and weights. What else lies in its folder changes nothing."""
    folder = Path(source)
    if not folder.is_dir():
        return {"source": source}
    return {"files": {path.name: file_digest(path) for path in model_files(folder, code=config.trust_remote_code)}}


def _read_task(config: RunConfig, data: Path | None, kind: str) -> tuple[Task, dict[Split, list[Any]], dict[str, str]]:
    if isinstance(config.task, TaskConfig):
        task = own_task(config.task)
        texts, paths = own_rows(config.task, task, kind, config.seed)
    else:
        task = load_task(config.task)
        folder = data if data is not None else (Path(config.data) if config.data else None)
        if from_hub(folder):
            texts, digests = hub_rows(task, kind, config.seed)
            return task, dict(texts), digests
        texts = load_rows(task, kind, folder, config.seed)
        paths = input_files(task, folder)
    return task, dict(texts), {name: file_digest(path) for name, path in paths.items()}
