"""What every stage's function gets, and what several of them read."""

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from plugbridge.config import PartsConfig, TrainConfig
from plugbridge.cost import Cost
from plugbridge.errors import NotFinite, TrainingDiverged
from plugbridge.evaluate import option_scores, predictions
from plugbridge.families.spec import Layout
from plugbridge.generate import generate_texts
from plugbridge.markers import CHECKPOINT, reading
from plugbridge.parsing import shown
from plugbridge.prepare import Prepared
from plugbridge.progress import Progress
from plugbridge.shrink.prune import BridgePlan
from plugbridge.streaming import values_of
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.metrics import Answer, chosen, metrics_of, written
from plugbridge.tasks.rows import Row
from plugbridge.tensors.headers import AGAIN
from plugbridge.train import Schedule, fit

WATCH = 10.0
"""Seconds after which a training looks whether the models' files have changed."""
BASIS = "basis:"  # marks projections among the kept positions on disk


@dataclass(frozen=True)
class Work:
    """What a stage's function gets: the prepared run, the run's root, its own folder, what it costs so far."""

    prepared: Prepared
    root: Path
    folder: Path
    progress: Progress
    cost: Cost


def schedule_of(train: TrainConfig, seed: int, rates: Mapping[str, float]) -> Schedule:
    """A training's numbers from its configuration."""
    assert train.optimizer is not None  # resolved
    return Schedule(
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rates=rates,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        clip=train.clip,
        checkpoint_every=train.checkpoint_every,
        seed=seed,
        micro_batch=train.micro_batch if isinstance(train, PartsConfig) else None,
        optimizer=train.optimizer,
    )


def train(
    work: Work,
    models: Sequence[nn.Module],
    parameters: Mapping[str, Tensor],
    rows: Sequence[Encoded],
    loss_of: Callable[[list[Encoded]], Tensor],
    schedule: Schedule,
    title: str,
) -> list[float]:
    """Train named tensors as `plugbridge.train.fit` does, resuming from the stage's checkpoint; returns the losses.

    Where the first loss is not finite already, the message says what is wrong with the `models` in it. Raises
    ModelError soon after a model's files have changed.
    """
    with explained(*models):
        return fit(
            parameters, rows, _watching(work.prepared, loss_of), schedule, work.folder / CHECKPOINT, work.progress,
            title, lambda row: row.weight, work.cost,
        )  # fmt: skip


def _watching(prepared: Prepared, loss_of: Callable[[list[Encoded]], Tensor]) -> Callable[[list[Encoded]], Tensor]:
    """A loss that looks now and then whether the models' files are what they were."""
    looked = time.monotonic()

    def loss(rows: list[Encoded]) -> Tensor:
        nonlocal looked
        if time.monotonic() - looked >= WATCH:
            prepared.require_unchanged()
            looked = time.monotonic()
        return loss_of(rows)

    return loss


@contextmanager
def explained(*models: nn.Module) -> Generator[None]:
    """Say what is wrong with the models where a first loss is not finite."""
    try:
        yield
    except TrainingDiverged as error:
        if error.learned:
            raise
        raise TrainingDiverged(f"{error}: {why_not_finite(*models)}", learned=False) from error


def why_not_finite(*models: nn.Module) -> str:
    """What makes models' numbers NaN or infinite."""
    dtypes: dict[str, None] = {}
    for model in models:
        for name, values in values_of(model):
            if not bool(values.isfinite().all()):
                source = f" of {path}" if (path := getattr(model, "name_or_path", "")) else ""
                own = name.replace(".base_layer", "")  # peft's wrapping
                return f"tensor {shown(own)}{source} has entries that are NaN or infinite; {AGAIN}"
            if values.is_floating_point():
                dtypes[str(values.dtype).removeprefix("torch.")] = None
    advice = "; use dtype: float32" if dtypes.keys() - {"float32"} else ""
    return f"every weight is finite, so it overflows in {' or '.join(dtypes)}{advice}"


def answers_of(
    p: Prepared, model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], progress: Progress, title: str
) -> list[Answer]:
    """A model's answers to rows: the likeliest options, or what it writes where the task's form generates.

    Raises NotFinite, with what is wrong with the model.
    """
    try:
        return _answers(p, model, encoder, rows, progress, title)
    except NotFinite as error:
        raise NotFinite(f"{error}: {why_not_finite(model)}; if it was trained, try a lower learning rate") from error


def _answers(
    p: Prepared, model: nn.Module, encoder: Encoder, rows: Sequence[Encoded], progress: Progress, title: str
) -> list[Answer]:
    form, size = p.task.form(encoder.kind), p.config.evaluate.batch_size
    sources = [source_of(row) for row in rows]
    if form.generate is not None:
        texts = generate_texts(model, encoder, rows, form.max_new_tokens, size, progress, title)
        return [written(form, row, text) for row, text in zip(sources, texts, strict=True)]
    scores = option_scores(model, encoder, rows, size, progress, title)
    return [chosen(*found) for found in zip(sources, predictions(scores), scores, strict=True)]


def source_of(row: Encoded) -> Row:
    """The row that tokens were made from."""
    assert row.row is not None
    return row.row


def accuracy(work: Work, model: nn.Module, encoder: Encoder, rows: list[Encoded], title: str) -> dict[str, float]:
    """The task's metrics of a model on rows."""
    answers = answers_of(work.prepared, model, encoder, rows, work.progress, title)
    return metrics_of(work.prepared.task.metrics, answers)


def read_plan(root: Path) -> BridgePlan:
    """The plan that `prune` left."""
    with reading(root / "prune"):
        sizes: dict[str, int] = json.loads((root / "prune" / "sizes.json").read_text(encoding="utf-8"))
        tensors = load_file(str(root / "prune" / "keep.safetensors"))
    keep = {key: tensor for key, tensor in tensors.items() if not key.startswith(BASIS)}
    basis = {key.removeprefix(BASIS): tensor for key, tensor in tensors.items() if key.startswith(BASIS)}
    return BridgePlan(sizes, keep, basis)


def layouts(work: Work) -> tuple[Layout, Layout]:
    """Small and large layouts."""
    p = work.prepared
    small, large = (p.without_weights[source][1] for source in (p.config.small, p.config.large_path))
    return small, large


def bridge_folder(work: Work) -> Path:
    """Where the Bridge to couple is: repaired if the run repairs it."""
    return work.root / ("repair" if work.prepared.config.repair is not None else "prune") / "bridge"
