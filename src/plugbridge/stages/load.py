"""How much work a run's stages are beside each other, roughly: for the time that is left while it goes on."""

from collections.abc import Mapping

from plugbridge.prepare import Prepared
from plugbridge.transfer.couple import find_mode

BACKWARD = 2
"""Forward passes that a backward pass takes as long as."""


def loads_of(prepared: Prepared) -> Mapping[str, float]:
    """Rows that every stage of a run puts through a model, times the model's bytes; by stage, as if all were run."""
    config = prepared.config
    sizes = {"small": _bytes(prepared, config.small), "large": _bytes(prepared, config.large_path)}
    step, validation = 1 + BACKWARD, len(prepared.rows["validation"])
    scored = len(prepared.rows[config.evaluate.split])
    scored = scored if config.evaluate.limit is None else min(scored, config.evaluate.limit)
    mode, score = find_mode(config.couple.mode), config.score
    couple = 1 + step if mode.exact else 2 if mode.runs_large else 1  # blocks are run again
    rows = {
        "tune": sizes["small"] * (step * config.tune.steps * config.tune.batch_size + validation),
        "score": sizes["large"] * score.samples * (step if score.importance == "fisher" else 1),
        "prune": sizes["large"],
        "couple": sizes["large"] * config.couple.steps * config.couple.batch_size * couple,
        "plug": sizes["large"],
        "evaluate": 2 * scored * sum(sizes.values()),
    }
    if config.repair is not None:
        rows["repair"] = sizes["large"] * 2 * config.repair.steps * config.repair.batch_size
    if config.polish is not None:
        rows["polish"] = sizes["large"] * config.polish.evaluations * config.polish.rows
    if config.ceiling is not None:
        rows["ceiling"] = sizes["large"] * (step * config.ceiling.steps * config.ceiling.batch_size + validation)
        rows["evaluate"] += scored * sizes["large"]
    for name, settings in config.baselines:
        if settings is not None:
            size = sizes[str(name).partition("_")[0]]
            rows[name] = size * (step * settings.steps * settings.batch_size + validation)
    return rows


def _bytes(prepared: Prepared, source: str) -> int:
    checkpoint = prepared.checkpoints.get(source)
    return 1 if checkpoint is None else checkpoint.nbytes
