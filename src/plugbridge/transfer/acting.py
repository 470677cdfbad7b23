"""Every setting acts or is refused: what was given and could do nothing in the mode at hand."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from plugbridge.config import LargeConfig, RunConfig, TaskConfig
from plugbridge.errors import ConfigError
from plugbridge.tasks.spec import load_task
from plugbridge.transfer.couple import MODES, Mode, find_mode
from plugbridge.transfer.needed import stages_of

FREE = (
    "resident", "device", "trust_remote_code", "score.keep", "couple.cache", "evaluate.batch_size",
    *(f"{section}.checkpoint_every" for section in ("tune", "repair", "couple", "ceiling")),
    *(f"{section}.micro_batch" for section in ("tune", "couple", "ceiling")),
)  # fmt: skip
"""Keys that change how a run goes and not what it gives, beyond rounding: they may stand anywhere.

With dropout `micro_batch` does change results: which numbers are dropped follows from the rows that go through
together.
"""


OF_STEPS = (
    "learning_rate", "batch_size", "micro_batch", "warmup", "optimizer", "weight_decay", "clip", "plug_learning_rate",
    "down", "bridge", "bridge_learning_rate", "activations", "error_bound", "kept_bits", "perturbation", "recompute",
    "bridge_resident", "fidelity_rows", "fidelity_every",
)  # fmt: skip
"""Keys of `couple` that only its steps read."""
RUN_ONLY = ("large_zero_shot", "large_probe", "large_proxy", "large_plugged")
"""Models of which scoring has the large one run forward only."""


def check_acting(config: RunConfig) -> None:
    """Refuse a setting that is not at its default and can do nothing, once the mode's defaults are written out.

    Sections of stages that the run does not do may stay (`stages_of`). Raises ConfigError.
    """
    for key, value, why, _ in _given_idle(config):
        said = f"{key} is {value!r}" if not isinstance(value, BaseModel) else f"there is a `{key}:` section"
        raise ConfigError(f"{said}, but {why}; leave it out")


def idle_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that `check_acting` refuses, by dotted key, with the defaults that they may have."""
    return {key: default for key, _, _, default in _given_idle(config)}


def _given_idle(config: RunConfig) -> Iterator[tuple[str, Any, str, Any]]:
    """Keys that are not at their default and can do nothing: their value, why, and the default."""
    for key, why in _idle(config, find_mode(config.couple.mode)):
        owner: BaseModel = config
        *path, last = key.split(".")
        for part in path:
            owner = getattr(owner, part)
        if _is_given(owner, last):
            yield key, getattr(owner, last), why, _default(owner, last)


def idle_sections(config: RunConfig) -> str | None:
    """What is to be said of sections for a Bridge that the mode does not have, which runs to be compared may inherit.

    Defaults must not be written out yet. Raises ConfigError for an unknown mode.
    """
    given = [f"`{name}:`" for name in ("score", "prune") if _is_given(config, name)]
    mode = find_mode(config.couple.mode)
    if not given or mode.has_bridge or "couple" not in stages_of(config):
        return None
    return f"{' and '.join(given)} change{'s' * (len(given) == 1)} nothing: in mode '{mode.name}' there is no Bridge"


def without_idle_steps(config: RunConfig) -> RunConfig:
    """A configuration that inherits what only steps read, without it where there are none: of runs to be compared."""
    couple = config.couple
    if couple.steps > 0:
        return config
    fields = type(couple).model_fields
    plain = {name: fields[name].get_default(call_default_factory=True) for name in OF_STEPS}
    return config.model_copy(update={"couple": couple.model_copy(update=plain)})


def _is_given(owner: BaseModel, name: str) -> bool:
    """Whether a setting is not at its default."""
    return getattr(owner, name) != _default(owner, name)


def _default(owner: BaseModel, name: str) -> Any:
    return type(owner).model_fields[name].get_default(call_default_factory=True)


def runs_again(config: RunConfig) -> bool:
    """Whether coupling may run something again for its gradients, or keep it: whether `couple.recompute` acts.

    Defaults are written out.
    """
    mode = find_mode(config.couple.mode)
    return (
        config.couple.steps > 0
        and not mode.exact
        and not (mode.name == "feedback" and config.couple.activations == "large")
        and not mode.name.startswith(("ladder", "mezo"))
        and not (mode.reads_alone and config.method.name == "prefix")
    )


def _runs_large(config: RunConfig, mode: Mode, stages: set[str]) -> bool:
    """Whether anything has the large model run forward only, which is where its weights may be quantised."""
    couple = config.couple
    asked = config.evaluate.models
    scored = RUN_ONLY if not mode.runs_large else (*RUN_ONLY, "bridge_coupled")
    if asked is None or set(asked) & {*scored} or {"repair", "polish"} & stages:
        return True
    fitted = couple.plug in ("ridge", "procrustes") or couple.layer_map != "uniform"
    return "couple" in stages and ((mode.runs_large and couple.steps > 0) or fitted)


def _idle(config: RunConfig, mode: Mode) -> Iterator[tuple[str, str]]:
    """Keys that can do nothing, and why."""
    stages = stages_of(config)
    method, couple = config.method.name, config.couple
    if isinstance(config.task, TaskConfig):
        yield "data", "the task's own files are named under `task`"
    elif load_task(config.task).shipped:
        yield "data", f"the rows of task '{config.task}' come with plugbridge"
    if method != "lora":
        yield "method.alpha", f"only lora has an alpha, not {method}"
        yield "method.dropout", f"only lora has dropout, not {method}"
    if isinstance(config.large, LargeConfig) and not _runs_large(config, mode, stages):
        yield "large.load_in", "nothing that is asked for has the large model run forward only"
    if "couple" not in stages:
        return
    here = f"in mode '{mode.name}'"
    if couple.steps == 0:
        written = {
            "optimizer": "adamw",
            "activations": "bridge" if config.prune.weight_bits == 16 else "large",
        }  # by `resolve`
        for name in OF_STEPS:
            if name not in written or getattr(couple, name) != written[name]:
                yield f"couple.{name}", "couple.steps is 0"
    if not runs_again(config):
        what = "every block" if mode.exact else "nothing"
        kept = " with activations: large" if mode.name == "feedback" else ""
        with_these = " with prefixes" if mode.reads_alone else kept
        yield "couple.recompute", f"{here}{with_these} {what} is run again"
    if not mode.trains_bridge and not mode.exact:
        others = ", ".join(name for name, other in MODES.items() if other.trains_bridge or other.exact)
        yield (
            "method.dropout",
            f"{here} the module runs without it, or its error would be another network's (it acts in {others})",
        )
    if not mode.trains_bridge:
        yield "couple.bridge", f"{here} the Bridge never trains"
    if not mode.trains_bridge or couple.bridge == "freeze":
        yield "couple.bridge_learning_rate", "the Bridge does not train"
    if mode.name != "feedback":
        yield "couple.activations", f"{here} no error goes back through the Bridge alone"
        yield "couple.fidelity_rows", f"{here} no error goes back through a Bridge to be compared"
    elif config.score.importance != "fisher":
        yield "couple.fidelity_rows", "without importance: fisher no gradient of the large model is ever taken"
    if mode.name != "feedback" or couple.fidelity_rows == 0 or config.score.importance != "fisher":
        yield "couple.fidelity_every", "with mode 'feedback' and some fidelity_rows only an error is compared"
    if mode.name != "feedback":
        yield "couple.bridge_resident", f"{here} no Bridge is read block by block"
    if mode.name != "feedback" or couple.activations != "large":
        yield "couple.kept_bits", "only with activations: large in mode 'feedback' is anything kept"
        yield "couple.error_bound", "only with activations: large in mode 'feedback' positions are left out"
    if config.prune.weight_bits == 16:
        yield "prune.rounding", "with prune.bits: 16 no weight is rounded"
    elif not mode.reads_tokens and config.score.importance != "fisher":
        yield "prune.rounding", "without importance: fisher no errors are known, and rounding is to nearest"
    if mode.name != "mezo":
        yield "couple.perturbation", f"{here} the module is tuned by its gradient, not moved to see the loss change"
    if not mode.has_bridge:
        yield "prune.bits", f"{here} there is no Bridge"
        yield "prune.shuffle", f"{here} there is no Bridge"
        yield "prune.whole", f"{here} there is no Bridge"
        yield "repair", f"{here} there is no Bridge to fit"
    elif config.prune.reduction == 1:
        yield "prune.whole", "with prune.reduction: 1 everything stays whole"
    if couple.plug == "fresh" and couple.down == "select" and mode.name != "ladder":
        yield "couple.plug_learning_rate", f"{here} a fresh start has no plug, and no way down trains"
    if couple.plug in ("fresh", "random") and couple.layer_map == "uniform":
        yield "couple.align_samples", f"plug: {couple.plug} and layer_map: uniform are fitted to no states"
