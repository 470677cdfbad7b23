"""Disk that stages fill while they last, as far as it is known before a run begins."""

from plugbridge.config import TrainConfig
from plugbridge.families.spec import Layout, layout_of_config
from plugbridge.models import load_config, parameter_count
from plugbridge.prepare import Prepared, bridge_sizes
from plugbridge.shrink.sizes import count_bytes, count_parameters
from plugbridge.shrink.vectors import vector_bytes
from plugbridge.stages.couple import cached_bytes
from plugbridge.tasks.encode import Encoded
from plugbridge.train import drawn
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.ladder import length_in
from plugbridge.transfer.needed import passing

WIDE = 4
"""Bytes of a float32 number: of modules and Bridges that train."""


def score_room(p: Prepared) -> int:
    """The most bytes of states that scoring will have on disk at a time, and of the vectors that it leaves."""
    large = load_config(p.config.large_path, trust_remote_code=p.config.trust_remote_code)
    layout, kind = layout_of_config(large.to_dict()), p.large_encoder.kind
    vectors = passing(p.config)  # of axes that config.json may not give
    left = 0 if vectors is None else vector_bytes(_bridge(p)[0], vectors, p.config.score.samples)
    if p.config.score.keep != "disk" or p.streamed is None:
        return left
    rows = drawn(p.large_rows["train"], p.config.score.samples, p.config.seed)
    return left + p.dtype.itemsize * sum(kept_numbers(layout, row, kind) for row in rows)


def kept_numbers(layout: Layout, row: Encoded, kind: str) -> int:
    """Numbers on disk of a row that is scored from disk, at most.

    It leaves a state at every block; six more, a mask and three times T5's position biases are room for what goes from
    block to block.
    """
    lengths = {stack: length_in(row, stack, kind) for stack in layout.layers}
    states = sum((layout.layers[stack] + 6) * length * layout.sizes["hidden"] for stack, length in lengths.items())
    longest = max(lengths.values())
    biases = 0 if kind == "causal" else 3 * layout.sizes["heads"] * sum(n * longest for n in lengths.values())
    return states + biases + longest * longest


def bridge_room(p: Prepared) -> int:
    """Bytes of the Bridge that pruning will write."""
    return count_bytes(*_bridge(p), p.config.prune.weight_bits, p.dtype.itemsize)


def repair_room(p: Prepared) -> int:
    """Bytes of a Bridge that is repaired, and of its step checkpoints, as if all of it trained."""
    assert p.config.repair is not None
    return _bridge_parameters(p) * trained_bytes(p.config.repair, WIDE)


def couple_room(p: Prepared) -> int:
    """Bytes of the activations that coupling keeps on disk, and of the Bridge of a mode that trains Bridges."""
    couple = p.config.couple
    if not find_mode(couple.mode).trains_bridge:
        return cache_room(p)
    if couple.bridge == "freeze":
        return cache_room(p) + count_bytes(*_bridge(p), p.config.prune.weight_bits, WIDE)
    return cache_room(p) + _bridge_parameters(p) * trained_bytes(couple, WIDE)


def baseline_room(p: Prepared, size: str, kind: str, settings: TrainConfig) -> int:
    """Bytes of a model of which all weights train and of its step checkpoints; of states, beside a ladder."""
    if kind == "ladder":
        return score_room(p) if size == "large" else 0
    source = p.config.large_path if size == "large" else p.config.small
    return parameter_count(p.without_weights[source][0]) * trained_bytes(settings, p.dtype.itemsize)


def trained_bytes(settings: TrainConfig, width: int) -> int:
    """The most bytes on disk of a number of `width` bytes that trains: its step checkpoints, and itself at the end.

    There are two checkpoints while one is written; the last one, behind the last step, goes when the result is there.
    """
    moments = 2 * width if settings.optimizer == "adamw" else 0  # adafactor keeps rows and columns
    written = -(-settings.steps // settings.checkpoint_every)
    checkpoint = width + moments if written else 0
    return max(min(written, 2) * checkpoint, width + checkpoint)


def _bridge_parameters(p: Prepared) -> int:
    return count_parameters(*_bridge(p))


def _bridge(p: Prepared) -> tuple[Layout, set[str], dict[str, int]]:
    """The large model's layout, the names of its weights, and the Bridge's sizes."""
    model, layout = p.without_weights[p.config.large_path]
    names = {name for name, _ in model.named_parameters()}
    return layout, names, bridge_sizes(p.config, model, layout)


def cache_room(prepared: Prepared) -> int:
    """Bytes of the activations that coupling will write to disk."""
    return cached_bytes(prepared) if prepared.config.couple.cache == "disk" else 0
