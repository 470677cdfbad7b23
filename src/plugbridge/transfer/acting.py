"""Every setting acts or is refused: what was given and could do nothing in the mode at hand."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from plugbridge.config import RunConfig, TaskConfig
from plugbridge.errors import ConfigError
from plugbridge.tasks.spec import load_task
from plugbridge.transfer.couple import Mode, find_mode

FREE = (
    "resident", "device", "trust_remote_code", "score.keep", "couple.cache", "couple.recompute", "evaluate.batch_size",
    *(f"{section}.checkpoint_every" for section in ("tune", "repair", "couple", "ceiling")),
    *(f"{section}.micro_batch" for section in ("tune", "couple", "ceiling")),
)  # fmt: skip
"""Keys that change how a run goes and not what it gives, beyond rounding: they may stand anywhere.

With dropout `micro_batch` does change results: which numbers are dropped follows from the rows that go through
together.
"""


OF_STEPS = (
    "learning_rate", "batch_size", "micro_batch", "warmup", "optimizer", "weight_decay", "clip", "plug_learning_rate",
    "down", "bridge", "bridge_learning_rate",
)  # fmt: skip
"""Keys of `couple` that only its steps read. A control without steps may inherit them from what it is compared with."""


def check_acting(config: RunConfig) -> None:
    """Refuse a setting that is not at its default and can do nothing, once the mode's defaults are written out.

    Sections of stages that `evaluate.models` leaves out may stay. Raises ConfigError.
    """
    for key, why in _idle(config, find_mode(config.couple.mode)):
        owner: BaseModel = config
        *path, last = key.split(".")
        for part in path:
            owner = getattr(owner, part)
        value: Any = getattr(owner, last)
        if _is_given(owner, last):
            said = f"{key} is {value!r}" if not isinstance(value, BaseModel) else f"there is a `{key}:` section"
            raise ConfigError(f"{said}, but {why}; leave it out")


def without_effect(config: RunConfig) -> list[str]:
    """What a control may inherit and cannot use, a line each, once the mode's defaults are written out."""
    if "couple" not in config.stages:
        return []
    couple, found = config.couple, list[str]()
    if couple.steps == 0:
        resolved = ("optimizer",) if couple.optimizer == "adamw" else ()  # what no steps have by default
        given = [name for name in OF_STEPS if name not in resolved and _is_given(couple, name)]
        if given:
            verb = "changes" if len(given) == 1 else "change"
            found.append(f"couple.steps is 0: couple.{', couple.'.join(given)} {verb} nothing")
    if couple.mode == "identity":
        found.append("mode 'identity' has no Bridge: `score` and `prune` change nothing in the plugged checkpoint")
    return found


def _is_given(owner: BaseModel, name: str) -> bool:
    """Whether a setting is not at its default."""
    field = type(owner).model_fields[name]
    return getattr(owner, name) != field.get_default(call_default_factory=True)


def _idle(config: RunConfig, mode: Mode) -> Iterator[tuple[str, str]]:
    """Keys that can do nothing, and why."""
    method, couple = config.method.name, config.couple
    if isinstance(config.task, TaskConfig):
        yield "data", "the task's own files are named under `task`"
    elif load_task(config.task).shipped:
        yield "data", f"the rows of task '{config.task}' come with plugbridge"
    if method != "lora":
        yield "method.alpha", f"only lora has an alpha, not {method}"
        yield "method.dropout", f"only lora has dropout, not {method}"
    if "couple" not in config.stages:
        return
    here = f"in mode '{mode.name}'"
    if not mode.trains_bridge:
        yield "method.dropout", f"{here} the module runs without it, or its error would be another network's"
        yield "couple.bridge", f"{here} the Bridge never trains"
    if not mode.trains_bridge or couple.bridge == "freeze":
        yield "couple.bridge_learning_rate", "the Bridge does not train"
    if mode.name != "feedback":
        yield "couple.activations", f"{here} no error goes back through the Bridge alone"
    if mode.name != "feedback" or couple.activations != "large":
        yield "couple.error_bound", "only with activations: large in mode 'feedback' positions are left out"
    if mode.name == "identity":
        yield "prune.bits", f"{here} there is no Bridge"
        yield "prune.shuffle", f"{here} there is no Bridge"
        yield "repair", f"{here} there is no Bridge to fit"
    if couple.plug == "fresh" and couple.down == "select" and mode.name != "ladder":
        yield "couple.plug_learning_rate", f"{here} a fresh start has no plug, and no way down trains"
    if couple.plug in ("fresh", "random") and couple.layer_map == "uniform":
        yield "couple.align_samples", f"plug: {couple.plug} and layer_map: uniform are fitted to no states"
