"""Disk that stages fill while they last, as far as it is known before a run begins."""

from plugbridge.config import TrainConfig
from plugbridge.families.spec import layout_of_config
from plugbridge.models import layout_for, load_config, load_model, parameter_count
from plugbridge.prepare import Prepared, bridge_sizes
from plugbridge.shrink.prune import count_parameters
from plugbridge.stages.couple import rows_drawn
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.ladder import length_in

WHOLE = 4
"""Bytes of a weight that trains."""


def score_room(p: Prepared) -> int:
    """The most bytes of states that scoring will have on disk at a time.

    A row leaves a state at every block; six more, a mask and three times T5's position biases are room for what goes
    from block to block.
    """
    if p.config.score.keep != "disk" or p.streamed is None:
        return 0
    large = load_config(p.config.large_path, trust_remote_code=p.config.trust_remote_code)
    layout, kind = layout_of_config(large.to_dict()), p.large_encoder.kind
    total = 0
    for row in p.large_rows["train"][: p.config.score.samples]:
        lengths = {stack: length_in(row, stack, kind) for stack in layout.layers}
        states = sum((layout.layers[stack] + 6) * length * layout.sizes["hidden"] for stack, length in lengths.items())
        longest = max(lengths.values())
        biases = 0 if kind == "causal" else 3 * layout.sizes["heads"] * sum(n * longest for n in lengths.values())
        total += p.dtype.itemsize * (states + biases + longest * longest)
    return total


def bridge_room(p: Prepared) -> int:
    """Bytes of the Bridge that pruning will write."""
    return _bridge_parameters(p) * p.dtype.itemsize


def couple_room(p: Prepared) -> int:
    """Bytes of the activations that coupling keeps on disk, and of a Bridge that trains and its step checkpoints."""
    couple = p.config.couple
    if not (find_mode(couple.mode).trains_bridge and couple.bridge == "train" and couple.steps > 0):
        return cache_room(p)
    return cache_room(p) + _bridge_parameters(p) * (WHOLE + _checkpointed(couple))


def baseline_room(p: Prepared, size: str, kind: str, settings: TrainConfig) -> int:
    """Bytes of a model of which all weights train and of its step checkpoints; of states, beside a ladder."""
    if kind == "ladder":
        return score_room(p) if size == "large" else 0
    source = p.config.large_path if size == "large" else p.config.small
    model = load_model(source, device="meta", trust_remote_code=p.config.trust_remote_code)
    return parameter_count(model) * (p.dtype.itemsize + _checkpointed(settings))


def _checkpointed(settings: TrainConfig) -> int:
    """Bytes of a weight in step checkpoints, of which there are two while one is written."""
    if settings.steps <= settings.checkpoint_every:
        return 0
    moments = 2 * WHOLE if settings.optimizer == "adamw" else 0  # adafactor keeps rows and columns
    return 2 * (WHOLE + moments)


def _bridge_parameters(p: Prepared) -> int:
    model = load_model(p.config.large_path, device="meta", trust_remote_code=p.config.trust_remote_code)
    layout = layout_for(model)
    names = {name for name, _ in model.named_parameters()}
    return count_parameters(layout, names, bridge_sizes(p.config, model, layout))


def cache_room(prepared: Prepared) -> int:
    """Bytes of the activations that coupling will write to disk."""
    config, kind = prepared.config, prepared.large_encoder.kind
    places = find_mode(config.couple.mode).caches
    if config.couple.cache != "disk" or places is None:
        return 0
    large = load_config(config.large_path, trust_remote_code=config.trust_remote_code)
    layout = layout_of_config(large.to_dict())
    stacks = [rung.partition(":")[0] for rung in places(layout)]
    positions = sum(length_in(row, stack, kind) for row in set(rows_drawn(prepared)) for stack in stacks)
    return positions * layout.sizes["hidden"] * prepared.dtype.itemsize
