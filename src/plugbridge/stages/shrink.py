"""Scoring the large model's units and pruning it into the Bridge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from plugbridge.cost import free_memory
from plugbridge.errors import ModelError
from plugbridge.evaluate import log_likelihood
from plugbridge.families.spec import Layout
from plugbridge.files import folder_atomically, write_atomically, write_json
from plugbridge.models import parameter_count
from plugbridge.prepare import bridge_sizes
from plugbridge.progress import Progress
from plugbridge.shrink.importance import (
    Importance,
    SecondMoments,
    activation,
    fisher,
    magnitude,
    record_second_moments,
    residual_energy,
)
from plugbridge.shrink.prune import plan_bridge, principal_basis, prune_model, shuffle_blocks
from plugbridge.shrink.stream_fisher import streamed_fisher
from plugbridge.shrink.sweep import blocks_of, sweep
from plugbridge.stages.work import BASIS, Work
from plugbridge.streaming import window_of
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.transfer.couple import find_mode


@dataclass(frozen=True)
class Units:
    """What is known of a model's units: their scores, and the residual stream's energy and second moments."""

    scores: dict[str, Tensor]
    energy: dict[str, Tensor]
    moments: dict[str, Tensor]


def measure_units(
    work: Work, model: PreTrainedModel, layout: Layout, encoder: Encoder, rows: Sequence[Encoded]
) -> Units:
    """Score a model's units on rows as the configuration says. Raises ModelError where a score is not finite."""
    settings = work.prepared.config.score
    return units_of(model, layout, encoder, rows[: settings.samples], settings.importance, work.progress)


def units_of(
    model: PreTrainedModel,
    layout: Layout,
    encoder: Encoder,
    rows: Sequence[Encoded],
    importance: Importance,
    progress: Progress,
) -> Units:
    """Score a model's units on rows, one at a time. Raises ModelError where a score is not finite."""

    def likelihood(row: Encoded) -> Tensor:
        return log_likelihood(model, gold(encoder, [row]).to(model.device), encoder.kind).sum()

    total = len(rows) * (1 if importance == "magnitude" else 2)
    moments: SecondMoments | None = None
    with progress.bar(f"score ({importance})", total) as advance:

        def counted() -> Iterator[Encoded]:
            for row in rows:
                yield row
                advance(1)

        reading = _reading(model, layout, rows, likelihood, advance)
        samples = reading.chunks if reading is not None else counted
        forward = reading.forward if reading is not None else likelihood
        if importance == "fisher":
            with record_second_moments(model, layout) as moments:
                scores = (
                    fisher(model, layout, counted(), likelihood)
                    if reading is None
                    else streamed_fisher(model, layout, counted(), likelihood, reading.rows_kept)
                )
        elif importance == "activation":
            scores = activation(model, layout, samples(), forward)
        else:
            scores = magnitude(model, layout)
        with record_second_moments(model, layout) as activity:
            energy = residual_energy(model, layout, samples(), forward)
    found = {"activity": activity.total("activity"), "error": moments.total("error") if moments else None}
    second = {kind: matrix for kind, matrix in found.items() if matrix is not None}
    for key, values in {**scores, **energy, **second}.items():
        if not bool(values.isfinite().all()):
            raise ModelError(f"the scores of '{key}' in {model.name_or_path} are not finite; is a weight of it NaN?")
    return Units(scores, energy, second)


@dataclass(frozen=True)
class _Reading:
    """How a streamed model reads rows: many at a time, so that each block is read once for all of them.

    `rows_kept` is how many rows' states at every block fit in a quarter of the free memory.
    """

    chunks: Callable[[], Iterator[Sequence[Encoded]]]
    forward: Callable[[Sequence[Encoded]], None]
    rows_kept: int


def _reading(
    model: PreTrainedModel,
    layout: Layout,
    rows: Sequence[Encoded],
    likelihood: Callable[[Encoded], Tensor],
    advance: Callable[[int], None],
) -> _Reading | None:
    """For a streamed model, how it reads the rows; None for one in memory."""
    if window_of(model) is None:
        return None
    blocks = blocks_of(model, layout)
    longest = max(len(row.prompt) + max(len(option) for option in row.options) for row in rows)
    state = longest * layout.sizes["hidden"] * model.dtype.itemsize
    states = max(1, free_memory(model.device.type) // 4 // state)

    def chunks() -> Iterator[Sequence[Encoded]]:
        for start in range(0, len(rows), states):
            yield rows[start : start + states]
            advance(len(rows[start : start + states]))

    return _Reading(
        chunks, lambda some: sweep(blocks, [partial(likelihood, row) for row in some]), max(1, states // len(blocks))
    )


def score(work: Work) -> dict[str, Any]:
    """Score the large model's units and record its residual energy."""
    p, settings = work.prepared, work.prepared.config.score
    model, layout = p.load_large()
    rows = p.large_rows["train"]
    units = measure_units(work, model, layout, p.large_encoder, rows)
    for name, tensors in (("scores", units.scores), ("energy", units.energy), ("moments", units.moments)):
        with write_atomically(work.folder / f"{name}.safetensors") as path:
            save_file(tensors, str(path))
    return {
        "samples": min(len(rows), settings.samples),
        "importance": settings.importance,
        "gradients_of_large": settings.importance == "fisher",
    }


def prune(work: Work) -> dict[str, Any]:
    """Prune the large model into the Bridge (Algorithm 1, line 3)."""
    p = work.prepared
    model, layout = p.load_large()
    scores = load_file(str(work.root / "score" / "scores.safetensors"))
    energy = load_file(str(work.root / "score" / "energy.safetensors"))
    whole = parameter_count(model)
    plan = plan_bridge(layout, scores, bridge_sizes(p.config, model, layout))
    if p.config.prune.channels != "select":
        plan = replace(plan, basis={"hidden": _basis(work, plan.sizes["hidden"])})
    bridge = prune_model(model, layout, plan, energy)
    if p.config.prune.shuffle:
        shuffle_blocks(bridge, layout, p.config.seed)
    with folder_atomically(work.folder / "bridge") as folder:
        bridge.save_pretrained(str(folder))
        p.large_encoder.tokenizer.save_pretrained(str(folder))
    with write_atomically(work.folder / "keep.safetensors") as path:
        save_file({**plan.keep, **{f"{BASIS}{key}": matrix for key, matrix in plan.basis.items()}}, str(path))
    write_json(work.folder / "sizes.json", plan.sizes)
    count = parameter_count(bridge)
    ends = sum(t.numel() for n, t in bridge.named_parameters() if n in layout.vocabulary())
    used = count if find_mode(p.config.couple.mode).reads_tokens else count - ends
    return {
        "large_parameters": whole,
        "bridge_parameters": used,
        "bridge_model_parameters": count,
        "bridge_share": used / whole,
        "sizes": plan.sizes,
        "large_sizes": layout.sizes,
        "reduction_of_axes": {a: layout.sizes[a] / plan.sizes[a] for a in layout.family.scope},
    }


def _basis(work: Work, size: int) -> Tensor:
    """Principal directions of the residual stream, as the configuration weighs them. Returns (size, hidden)."""
    moments = load_file(str(work.root / "score" / "moments.safetensors"))
    kinds = ("activity", "error") if work.prepared.config.prune.channels == "gradient_pca" else ("activity",)
    return principal_basis(torch.stack([moments[kind] / moments[kind].trace() for kind in kinds]).sum(0), size)
