"""Fitting the Bridge to the large model before coupling."""

from typing import Any

import torch

from plugbridge.files import folder_atomically, write_json
from plugbridge.models import load_model
from plugbridge.stages.work import Work, read_plan, schedule_of, train
from plugbridge.transfer.repair import repair_loss, repaired_parameters

RATE = 1e-3
"""Peak learning rate where the configuration gives none."""


def repair(work: Work) -> dict[str, Any]:
    """Fit the Bridge to the large model, which runs forward only."""
    p = work.prepared
    settings = p.config.repair
    assert settings is not None
    large, layout = p.load_run_only()
    bridge = load_model(str(work.root / "prune" / "bridge"), dtype=torch.float32, device=p.device)
    parameters = repaired_parameters(bridge, layout, settings.target)
    bridge.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = repair_loss(settings.target, large, layout, bridge, read_plan(work.root).to(p.device), p.large_encoder)
    rate = RATE if settings.learning_rate is None else settings.learning_rate
    schedule = schedule_of(settings, p.config.seed, {"": rate})
    rows, title = p.large_rows["train"], f"repair ({settings.target})"
    losses = train(work, [large, bridge], parameters, rows, loss, schedule, title)
    with folder_atomically(work.folder / "bridge") as folder:
        bridge.save_pretrained(str(folder))
        p.large_encoder.tokenizer.save_pretrained(str(folder))
    write_json(work.folder / "losses.json", losses)
    return {"target": settings.target, "loss_first": losses[0], "loss_last": losses[-1]}
