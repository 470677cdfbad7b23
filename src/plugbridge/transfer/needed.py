"""The stages that something asked for needs: by mode, start and the models to be scored, decided here alone."""

from plugbridge.config import RunConfig
from plugbridge.config.stages import MADE_BY, TRANSFER, Passing
from plugbridge.transfer.couple import find_mode

BRIDGE = ("score", "prune", "repair")
"""Stages that are there for the Bridge."""


def stages_of(config: RunConfig) -> set[str]:
    """The stages that a run does: those that make the models to be scored, and `evaluate`.

    Defaults need not be written out. Raises ConfigError for an unknown mode.
    """
    asked = MADE_BY if config.evaluate.models is None else config.evaluate.models
    return {stage for name in asked for stage in _made_by(config, name)} | {"evaluate"}


def makes(config: RunConfig, model: str) -> bool:
    """Whether the run does the stages that a model is made by."""
    return set(MADE_BY[model][-1:]) <= stages_of(config)


def couple_needs(config: RunConfig) -> tuple[str, ...]:
    """The stages whose results coupling reads, in their order."""
    needed = {stage for name in _coupled(config) for stage in _made_by(config, name)}
    return tuple(name for name in TRANSFER[: TRANSFER.index("couple")] if name in needed and name != "score")


def needs_bridge(config: RunConfig) -> bool:
    """Whether coupling reads the Bridge: not in `identity`, and without steps only where the Bridge is scored."""
    return "prune" in couple_needs(config)


def passing(config: RunConfig) -> Passing | None:
    """Which vectors a packed Bridge's rounding is chosen for; None where it is to nearest.

    A Bridge that reads tokens keeps products with its inputs, another one those with the errors that come back, which
    only fisher knows.
    """
    if config.prune.weight_bits == 16 or config.prune.rounding == "nearest":
        return None
    if find_mode(config.couple.mode).reads_tokens:
        return "inputs"
    return "errors" if config.score.importance == "fisher" else None


def _coupled(config: RunConfig) -> list[str]:
    """Of what comes from coupling, the models that are asked for; the plugged one where none is.

    A stage may be run by itself whatever is asked for.
    """
    asked = config.evaluate.models
    trains = find_mode(config.couple.mode).trains_bridge
    found = ["bridge_coupled"] if trains and (asked is None or "bridge_coupled" in asked) else []
    return [*found, "large_plugged"]


def _made_by(config: RunConfig, model: str) -> list[str]:
    """The stages that make a model with these settings."""
    mode, couple = find_mode(config.couple.mode), config.couple
    if model == "bridge_coupled" and not mode.trains_bridge:
        return []  # which is no model
    sections = {"repair": config.repair, "polish": config.polish, "ceiling": config.ceiling, **dict(config.baselines)}
    spared = {name for name, section in sections.items() if section is None}
    if "couple" in MADE_BY[model]:
        if (couple.plug or mode.plug) == "fresh":
            spared.add("tune")  # nothing of the small model is in it
        if not mode.has_bridge or (couple.steps == 0 and model == "large_plugged"):
            spared |= {*BRIDGE}
    return [stage for stage in MADE_BY[model] if stage not in spared]
