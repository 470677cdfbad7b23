"""Training a model's own module: the small model, and the large one as the ceiling."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plugbridge.config import TrainConfig
from plugbridge.evaluate import mean_loss
from plugbridge.files import folder_atomically, write_json
from plugbridge.models import parameter_count
from plugbridge.stages.depends import rate_of_training
from plugbridge.stages.work import Work, accuracy, schedule_of, train
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tasks.spec import Split
from plugbridge.tuners.module import attach, save, state_of, trainable


def tune(work: Work) -> dict[str, Any]:
    """Tune the small model (Algorithm 1, line 1)."""
    p = work.prepared
    return _tune(work, p.config.small, p.config.tune, p.encoder, p.rows, "tune small")


def ceiling(work: Work) -> dict[str, Any]:
    """Tune the large model itself, with gradients: not part of the method, its upper reference."""
    p = work.prepared
    assert p.config.ceiling is not None
    return _tune(work, p.config.large_path, p.config.ceiling, p.large_encoder, p.large_rows, "tune large (ceiling)")


def _tune(
    work: Work,
    source: str,
    settings: TrainConfig,
    encoder: Encoder,
    rows: Mapping[Split, list[Encoded]],
    title: str,
) -> dict[str, Any]:
    p = work.prepared
    model, layout = p.load(source)
    torch.manual_seed(p.config.seed)
    wrapped, config = attach(model, p.method, layout, p.settings)
    wrapped.train()
    rates = {"": rate_of_training(settings, p.method)}

    def loss(batch: list[Encoded]) -> Tensor:
        return mean_loss(wrapped, gold(encoder, batch).to(p.device), encoder.kind)

    parameters = trainable(wrapped)
    schedule = schedule_of(settings, p.config.seed, rates)
    losses = train(work, [model], parameters, rows["train"], loss, schedule, title)
    with folder_atomically(work.folder / "module") as folder:
        save(folder, config, state_of(wrapped), source)
    wrapped.eval()
    validation = accuracy(work, wrapped, encoder, rows["validation"], f"validate: {title}")
    write_json(work.folder / "losses.json", losses)
    return {
        "source": source,
        "rank": p.settings.rank,
        "trainable": sum(t.numel() for t in parameters.values()),
        "model_parameters": parameter_count(model) - sum(t.numel() for t in parameters.values()),
        "layers": layout.layers,
        "sizes": layout.sizes,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "validation": validation,
    }
