"""Polishing the plugged module, and folding it into a checkpoint of the large model."""

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from plugbridge.errors import ModelError, TrainingDiverged
from plugbridge.evaluate import mean_loss
from plugbridge.families.spec import Layout
from plugbridge.files import folder_atomically, write_json
from plugbridge.markers import EVALUATED, read_sealed, reading, write_marker
from plugbridge.stages.couple import read_coupled
from plugbridge.stages.work import Work, explained, layouts
from plugbridge.tasks.encode import gold
from plugbridge.train import drawn
from plugbridge.transfer.fold import fold
from plugbridge.transfer.polish import Factors, place_key, places_of, scaled, search
from plugbridge.tuners.module import Module, attach, load_state, pack, save, unpack

log = logging.getLogger(__name__)


def polish(work: Work) -> dict[str, Any]:
    """Tune a factor for every place of the plugged module on the large model, forward only."""
    p = work.prepared
    settings = p.config.polish
    assert settings is not None
    model, large = p.load_run_only()
    module = _folded(work, large)
    wrapped, _ = attach(model, p.method, large, p.settings)
    wrapped.eval()
    rows = drawn(p.large_rows["train"], settings.rows, p.config.seed)
    chunks = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    weights = [sum(row.weight for row in chunk) for chunk in chunks]
    batches = [gold(p.large_encoder, chunk).to(p.device) for chunk in chunks]

    @_written_down(work)
    @torch.no_grad()
    def loss_of(factors: Factors) -> float:
        load_state(wrapped, pack(p.method, large, scaled(p.method, module, factors)))
        total = [float(mean_loss(wrapped, batch, p.large_encoder.kind)) for batch in batches]
        return sum(value * weight for value, weight in zip(total, weights, strict=True)) / sum(weights)

    with work.progress.bar("polish", settings.evaluations) as advance, explained(wrapped):
        factors, losses = search(
            places_of(module), loss_of, settings.evaluations, p.config.seed, lambda: advance(1)
        )  # fmt: skip
    write_json(work.folder / "factors.json", factors)
    write_json(work.folder / "losses.json", [loss if math.isfinite(loss) else None for loss in losses])
    return {"loss_first": losses[0], "loss_last": min(losses), "large_rows": len(losses) * len(rows)}


def _written_down(work: Work) -> Callable[[Callable[[Factors], float]], Callable[[Factors], float]]:
    """Losses that are on disk once they are measured: the next attempt, which asks for the same, takes them from there.

    Raises ModelError for a file that is not as it was written.
    """
    path = work.folder / EVALUATED
    losses: list[float | None] = []
    if path.exists():
        found = read_sealed(path, {"losses": (list,), "cost": (dict,)}) or {}
        try:
            losses = [None if loss is None else float(loss) for loss in found["losses"]]
            work.cost.go_on(found["cost"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged; delete it to start the stage anew") from error
        log.info("resuming at evaluation %d from %s", len(losses), path)
    known = iter([math.inf if loss is None else loss for loss in losses])

    def remembering(loss_of: Callable[[Factors], float]) -> Callable[[Factors], float]:
        def loss(factors: Factors) -> float:
            if (before := next(known, None)) is not None:
                return before
            value = loss_of(factors)
            if losses or math.isfinite(value):  # a first one that is not finite ends the stage
                losses.append(value if math.isfinite(value) else None)
                write_marker(path, {"losses": losses, "cost": work.cost.so_far()})
            return value

        return loss

    return remembering


def _folded(work: Work, large: Layout) -> Module:
    """Module and plug in one, at large width."""
    p = work.prepared
    small, _ = layouts(work)
    module, plug_maps, _ = read_coupled(work.root / "couple" / "coupled.safetensors")
    folded = unpack(p.method, large, fold(p.method, small, large, plug_maps, module))
    if broken := [place_key(slot) for slot in sorted(folded) if not bool(folded[slot].isfinite().all())]:
        raise TrainingDiverged(
            f"module and plug together overflow at {broken[0]}; try a lower couple.learning_rate or "
            "couple.plug_learning_rate"
        )
    return folded


def plug(work: Work) -> dict[str, Any]:
    """Fold module and plug into a checkpoint of the large model (Algorithm 1, line 8)."""
    p = work.prepared
    _, large = layouts(work)
    module = _folded(work, large)
    if p.config.polish is not None:
        with reading(work.root / "polish" / "factors.json") as path:
            factors: Factors = json.loads(path.read_text(encoding="utf-8"))
        module = scaled(p.method, module, factors)
    state = pack(p.method, large, module)
    config = p.method.configure(large, p.method.roles, p.settings)
    with folder_atomically(work.folder / "checkpoint") as folder:
        save(folder, config, state, p.config.large_path)
    return {"changed": sum(t.numel() for t in state.values()), "tensors": len(state)}
