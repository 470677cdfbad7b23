"""Scoring the large model's units and pruning it into the Bridge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from plugbridge.errors import ModelError
from plugbridge.evaluate import log_likelihood
from plugbridge.families.spec import Layout
from plugbridge.files import folder_atomically, write_atomically, write_json
from plugbridge.markers import reading
from plugbridge.models import parameter_count
from plugbridge.prepare import bridge_sizes
from plugbridge.progress import Progress
from plugbridge.shrink.bridge import bridge_weights, empty_bridge, shuffled, write_bridge
from plugbridge.shrink.importance import (
    Importance,
    SecondMoments,
    activation,
    fisher,
    magnitude,
    record_second_moments,
    residual_energy,
)
from plugbridge.shrink.packing import (
    Order,
    Rounding,
    bytes_of,
    make_packed,
    matrices_of,
    packed_weights,
    to_nearest,
)
from plugbridge.shrink.prune import BridgePlan, plan_bridge, principal_basis, unit_sum
from plugbridge.shrink.rounding import calibrated
from plugbridge.shrink.shelf import Shelf
from plugbridge.shrink.stream_fisher import streamed_fisher
from plugbridge.shrink.sweep import Block, Done, blocks_of, sweep
from plugbridge.shrink.vectors import Vectors, read_vectors, record_vectors
from plugbridge.stages.work import BASIS, Work, why_not_finite
from plugbridge.streaming import block_bytes, window_of
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tensors.checkpoint import open_checkpoint
from plugbridge.tensors.packed import Bits, Packed
from plugbridge.train import drawn
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.needed import passing

VECTORS = "vectors"
"""The folder of what the large model's matrices are multiplied by, where a packed Bridge's rounding asks for it."""


@dataclass(frozen=True)
class Units:
    """What is known of a model's units: their scores, and the residual stream's energy and second moments.

    `kept_bytes` is what the rows' states took on disk.
    """

    scores: dict[str, Tensor]
    energy: dict[str, Tensor]
    moments: dict[str, Tensor]
    kept_bytes: int


def measure_units(
    work: Work, model: PreTrainedModel, layout: Layout, encoder: Encoder, rows: Sequence[Encoded]
) -> Units:
    """Score a model's units as the configuration says, on rows drawn by its seed.

    Raises ModelError where a score is not finite.
    """
    p = work.prepared
    settings, shelf, at_once = p.config.score, None, None
    chosen, streams = drawn(rows, settings.samples, p.config.seed), window_of(model) is not None
    if streams and settings.keep == "disk":
        shelf = Shelf(work.folder / "states.bin")
    elif streams:
        longest = max(len(row.prompt) + max(map(len, row.options)) for row in chosen)
        at_once = min(len(chosen), rows_at_once(layout, longest, model.dtype, block_bytes(model, layout)))
    vectors = None
    if (kind := passing(p.config)) is not None:
        vectors = Vectors(work.folder / VECTORS, kind, layout, len(chosen))
    return units_of(model, layout, encoder, chosen, settings.importance, work.progress, shelf, at_once, vectors)


def units_of(
    model: PreTrainedModel,
    layout: Layout,
    encoder: Encoder,
    rows: Sequence[Encoded],
    importance: Importance,
    progress: Progress,
    shelf: Shelf | None = None,
    at_once: int | None = None,
    vectors: Vectors | None = None,
) -> Units:
    """Score a model's units on rows, one at a time. Raises ModelError where a score is not finite.

    A streamed model reads several rows block by block: all of them, their states on the `shelf`, or `at_once`. What
    its matrices are multiplied by is recorded in `vectors`.
    """

    def likelihood(row: Encoded) -> Tensor:
        return log_likelihood(model, gold(encoder, [row]).to(model.device), encoder.kind).sum() / row.divisor

    streams = window_of(model) is not None
    chunk = len(rows) if shelf is not None else at_once if at_once is not None else 1
    with progress.bar(f"score ({importance})", rows_scored(importance, len(rows))) as advance:

        def counted() -> Iterator[Encoded]:
            for row in rows:
                yield row
                advance(1)

        def chunks() -> Iterator[Sequence[Encoded]]:
            for start in range(0, len(rows), chunk):
                yield rows[start : start + chunk]
                advance(len(rows[start : start + chunk]))

        blocks = blocks_of(model, layout)

        def read(some: Sequence[Encoded], done: Done = lambda _block: None) -> None:
            sweep(blocks, [partial(likelihood, row) for row in some], shelf, done)

        def finish(*sums: SecondMoments | Vectors | None) -> Done:
            def done(block: Block) -> None:
                for each in sums:
                    if each is not None and chunk >= len(rows):
                        each.finish(block.path)

            return done

        error = None
        if importance == "fisher":
            with record_second_moments(model, layout, ("error",)) as errors, record_vectors(model, vectors, "errors"):
                scores = (
                    streamed_fisher(model, layout, counted(), likelihood, chunk, shelf, finish(errors, vectors))
                    if streams
                    else fisher(model, layout, counted(), likelihood)
                )
            error = errors.total("error")
        elif importance == "activation":
            scores = activation(model, layout, *((chunks(), read) if streams else (counted(), likelihood)))
        else:
            scores = magnitude(model, layout)
        with record_second_moments(model, layout, ("activity",)) as moments, record_vectors(model, vectors, "inputs"):
            last = (chunks(), partial(read, done=finish(moments, vectors))) if streams else (counted(), likelihood)
            energy = residual_energy(model, layout, *last)
    found = {"activity": moments.total("activity"), "error": error}
    second = {kind: matrix for kind, matrix in found.items() if matrix is not None}
    for key, values in {**scores, **energy, **second}.items():
        if not bool(values.isfinite().all()):
            raise ModelError(f"the scores of '{key}' in {model.name_or_path} are not finite: {why_not_finite(model)}")
    return Units(scores, energy, second, shelf.bytes if shelf is not None else 0)


def rows_scored(importance: Importance, samples: int) -> int:
    """Rows that a model reads to be scored: each for its residual stream, and for all but magnitudes once more."""
    return samples * (1 if importance == "magnitude" else 2)


def rows_at_once(layout: Layout, length: int, dtype: torch.dtype, room: int) -> int:
    """How many rows' states at every block take `room` bytes, at least one row."""
    return max(1, room // (length * layout.sizes["hidden"] * dtype.itemsize * sum(layout.layers.values())))


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
        "kept_bytes": units.kept_bytes,
    }


def prune(work: Work) -> dict[str, Any]:
    """Prune the large model into the Bridge (Algorithm 1, line 3)."""
    p = work.prepared
    model, layout = p.load_large()
    with reading(work.root / "score"):
        scores = load_file(str(work.root / "score" / "scores.safetensors"))
        energy = load_file(str(work.root / "score" / "energy.safetensors"))
    whole = parameter_count(model)
    plan = plan_bridge(layout, scores, bridge_sizes(p.config, model, layout))
    if p.config.prune.channels != "select":
        plan = replace(plan, basis={"hidden": _basis(work, plan.sizes["hidden"])})
    bridge = empty_bridge(model, layout, plan)
    weights = bridge_weights(model, layout, plan, energy)
    if p.config.prune.shuffle:
        weights = shuffled(weights, layout, p.config.seed)
    alone = find_mode(p.config.couple.mode).reads_tokens
    count = parameter_count(bridge)
    ends = sum(t.numel() for n, t in bridge.named_parameters() if n in layout.vocabulary())
    bits = p.config.prune.weight_bits
    if bits != 16:
        paths = matrices_of(bridge, layout)
        order: Order = "in out" if alone else "out in"  # what is summed over comes first: inputs forward, outputs back
        make_packed(bridge, paths, bits, order)
        turned, rounding = order != layout.family.linear, rounding_of(work, layout, plan)
        weights = packed_weights(weights, paths, bits, turned, rounding)
    with folder_atomically(work.folder / "bridge") as folder:
        write_bridge(bridge, weights, folder)
        p.large_encoder.tokenizer.save_pretrained(str(folder))
    with write_atomically(work.folder / "keep.safetensors") as path:
        save_file({**plan.keep, **{f"{BASIS}{key}": matrix for key, matrix in plan.basis.items()}}, str(path))
    write_json(work.folder / "sizes.json", plan.sizes)
    used = count if alone else count - ends
    held = bytes_of(bridge, layout, alone)
    return {
        "large_parameters": whole,
        "bridge_parameters": used,
        "bridge_model_parameters": count,
        "bridge_share": used / whole,
        "bits": bits,
        "rounding": "nearest" if p.config.prune.shuffle else passing(p.config) or "nearest",
        "bridge_bytes": held,
        "bridge_bytes_share": held / (2 * whole),
        "sizes": plan.sizes,
        "large_sizes": layout.sizes,
        "reduction_of_axes": {a: layout.sizes[a] / plan.sizes[a] for a in layout.family.scope},
    }


def rounding_of(work: Work, layout: Layout, plan: BridgePlan) -> Rounding:
    """How a Bridge's matrices are rounded: for the vectors that `score` recorded, or to nearest."""
    kind = passing(work.prepared.config)
    if kind is None or work.prepared.config.prune.shuffle:
        return to_nearest

    def rounding(path: str, matrix: Tensor, bits: Bits) -> Packed:
        return calibrated(matrix, bits, read_vectors(work.root / "score" / VECTORS, kind, layout, plan, path))

    return rounding


def _basis(work: Work, size: int) -> Tensor:
    """Principal directions of the residual stream, as the configuration weighs them. Returns (size, hidden)."""
    kinds = ("activity", "error") if work.prepared.config.prune.channels == "gradient_pca" else ("activity",)
    # not mapped: the whole file would be in memory as long as a tensor of it
    file = open_checkpoint([work.root / "score" / "moments.safetensors"])
    return principal_basis(unit_sum(file.read(kind) for kind in kinds), size)
