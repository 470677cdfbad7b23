"""Training a model's own module: the small model, and the large one as the ceiling."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plugbridge.config import PartsConfig
from plugbridge.evaluate import mean_loss
from plugbridge.files import folder_atomically, write_json
from plugbridge.models import parameter_count
from plugbridge.stages.depends import rate_of_training
from plugbridge.stages.work import Work, accuracy, schedule_of, train
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tasks.spec import Split
from plugbridge.transfer.backprop import exact_loss
from plugbridge.transfer.coupling import Loss
from plugbridge.tuners.module import Module, attach, load_state, save, saved_key, state_of, trainable, unpack


def tune(work: Work) -> dict[str, Any]:
    """Tune the small model (Algorithm 1, line 1)."""
    p = work.prepared
    return _tune(work, p.config.small, p.config.tune, p.encoder, p.rows, "tune small")


def ceiling(work: Work) -> dict[str, Any]:
    """Tune the large model itself, with gradients: not part of the method, its upper reference.

    One that is streamed is trained block by block.
    """
    p = work.prepared
    assert p.config.ceiling is not None
    title, streams = "tune large (ceiling)", p.streamed is not None
    return _tune(work, p.config.large_path, p.config.ceiling, p.large_encoder, p.large_rows, title, streams)


def _tune(
    work: Work,
    source: str,
    settings: PartsConfig,
    encoder: Encoder,
    rows: Mapping[Split, list[Encoded]],
    title: str,
    streams: bool = False,
) -> dict[str, Any]:
    p = work.prepared
    model, layout = p.load_large() if streams else p.load(source)
    torch.manual_seed(p.config.seed)
    wrapped, config = attach(model, p.method, layout, p.settings)
    wrapped.train()
    rates = {"": rate_of_training(settings, p.method)}
    schedule = schedule_of(settings, p.config.seed, rates)
    parameters: dict[str, Tensor] = {**trainable(wrapped)}

    def whole(batch: list[Encoded]) -> Tensor:
        return mean_loss(wrapped, gold(encoder, batch).to(p.device), encoder.kind)

    loss: Loss = whole
    if streams:
        parameters = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in parameters.items()}

        def module() -> Module:
            return unpack(p.method, layout, {saved_key(name): tensor for name, tensor in parameters.items()})

        loss = exact_loss(wrapped, p.method, layout, encoder, module, micro_batch=settings.micro_batch)
        schedule = replace(schedule, micro_batch=None)  # its parts go through a block together
    losses = train(work, [model], parameters, rows["train"], loss, schedule, title)
    if streams:
        load_state(wrapped, {saved_key(name): tensor.detach() for name, tensor in parameters.items()})
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
