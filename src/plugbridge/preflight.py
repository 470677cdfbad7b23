"""What `config.json`, the settings and the rows tell, checked before torch or any model is imported.

`prepare` goes on from here: every decision stands in one place. Nothing is written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugbridge.config import BaselinesConfig, RunConfig, TaskConfig
from plugbridge.devices import check_device
from plugbridge.digests import file_digest
from plugbridge.errors import ConfigError, ModelError
from plugbridge.families.spec import Family, Layout, check_families, family_of, layout_of_config
from plugbridge.folders import check_config as check_model_config
from plugbridge.folders import check_vocabularies, check_weights
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.sources import check_files, pinned, read_model_config
from plugbridge.tasks.check import check_rows
from plugbridge.tasks.hub import from_hub, hub_rows
from plugbridge.tasks.metrics import check_metrics
from plugbridge.tasks.own import own_rows, own_task
from plugbridge.tasks.rows import Row, input_files, load_rows
from plugbridge.tasks.spec import Split, Task, load_task
from plugbridge.transfer.acting import check_acting, idle_sections
from plugbridge.transfer.couple import find_mode
from plugbridge.tuners.table import Method, MethodSettings, find_method


@dataclass(frozen=True)
class Checked:
    """A run's configuration with its defaults written out, its method, its task and the rows, and what they came from.

    `kind` is that of both models; `digests` are those of the task's files, by name; `said` is what a reader of the
    results should know of the rows, a line each; `idle` is what is to be said of sections that change nothing.
    """

    config: RunConfig
    method: Method
    settings: MethodSettings
    kind: str
    task: Task
    rows: Mapping[Split, list[Row]]
    digests: Mapping[str, str]
    said: tuple[str, ...] = ()
    idle: str | None = None


def preflight(config: RunConfig, data: Path | None) -> Checked:
    """Refuse what needs no model, tokenizer or device to be refused. Raises ConfigError, ModelError, DataError."""
    idle = idle_sections(config)
    config = with_commits(check_config(config))
    check_device(config.device)
    kind = check_models(config)
    task, rows, digests = _read_task(config, data, kind)
    check_metrics(task.metrics)
    check_probe(config, task, kind)
    said = tuple(check_rows(task, kind, rows))
    method = find_method(config.method.name)
    return Checked(config, method, settings_of(config), kind, task, rows, digests, said, idle)


def check_config(config: RunConfig) -> RunConfig:
    """The configuration with defaults written out, if its settings go together. Raises ConfigError."""
    find_method(config.method.name)
    config = resolve(config)
    check_settings(config)
    return config


def with_commits(config: RunConfig) -> RunConfig:
    """The configuration with both models at the commit that the hub's branch is at now, where they are from the hub.

    Raises ModelError.
    """
    large = pinned(config.large_path)
    whole = large if isinstance(config.large, str) else config.large.model_copy(update={"path": large})
    return config.model_copy(update={"small": pinned(config.small), "large": whole})


def check_runs(configs: Iterable[RunConfig]) -> None:
    """Refuse runs that are to be compared: one whose settings do not go together, or all if no run has its models.

    Raises ConfigError, ModelError.
    """
    missing: list[ModelError] = []
    checked = [check_config(config) for config in configs]
    for config in checked:
        try:
            check_models(config)
        except ModelError as error:
            missing.append(error)
    if missing and len(missing) == len(checked):
        raise missing[0]


def settings_of(config: RunConfig) -> MethodSettings:
    """The method's numbers: as configured, or its defaults."""
    asked, method = config.method, find_method(config.method.name)
    rank = asked.rank if asked.rank is not None else method.rank
    return MethodSettings(rank, asked.alpha if asked.alpha is not None else 2.0 * rank, asked.dropout)


def check_models(config: RunConfig, weights: bool = True) -> str:
    """The kind of both models, by their `config.json`, if they can be a pair.

    With `weights` their folders have weights and a tokenizer, too, as far as headers and JSON tell. Raises ModelError
    for one that is missing, of no known family, of another family than the other, or whose values are no model's,
    ConfigError for a Bridge that cannot be.
    """
    sources = (config.small, config.large_path)
    raw = [read_model_config(source) for source in sources]
    families = [_family(source, found) for source, found in zip(sources, raw, strict=True)]
    check_families(*families)
    for source, found, family in zip(sources, raw, families, strict=True):
        check_model_config(source, family, found)
        if weights:
            check_files(source, own_tokenizer=config.trust_remote_code)
            check_weights(source, family, found)
    if weights and not config.trust_remote_code:  # or the tokenizer may be of a model's own code
        check_vocabularies(*sources, raw)
    layout = _layout(raw[1], families[1])
    if layout is not None and config.prune.reduction is not None:
        reduced_sizes(layout, config.prune.reduction, config.prune.whole)
    return families[1].kind


def _family(source: str, raw: Mapping[str, Any]) -> Family:
    if not isinstance(raw.get("model_type"), str):
        raise ModelError(f"config.json of {source} names no model_type; expected a model of transformers")
    return family_of(raw["model_type"])


def _layout(raw: Mapping[str, Any], family: Family) -> Layout | None:
    """Layers and axes' sizes, where `config.json` says all that are pruned; it may leave out what is a default."""
    if any(raw.get(stack.layers) is None for stack in family.stack.values()):
        return None
    layout = layout_of_config(raw)
    tied = (axis for pair in (*family.constraints.equal, *family.constraints.divisible) for axis in pair[1].split())
    return layout if all(axis in layout.sizes for axis in (*family.scope, *tied)) else None


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the coupling mode's defaults written out. Raises ConfigError."""
    mode = find_mode(config.couple.mode)
    trains = mode.trains_bridge and config.couple.bridge == "train" and config.couple.steps > 0
    optimizer = mode.optimizer if trains else "adamw"
    prune = config.prune
    if prune.reduction is None and prune.budget is None:
        packs = mode.name == "feedback" and config.repair is None  # which would train it
        bits = prune.bits or (3 if packs else None)
        prune = prune.model_copy(update={"reduction": 4.0 if bits is None else 1.0, "bits": bits})
    activations = config.couple.activations or ("bridge" if prune.weight_bits == 16 else "large")
    layers = 1.0 if mode.name == "feedback" and activations == "large" else mode.layers
    chosen: dict[str, Any] = {
        "optimizer": config.couple.optimizer if config.couple.optimizer is not None else optimizer,
        "plug": config.couple.plug if config.couple.plug is not None else mode.plug,
        "layers": config.couple.layers if config.couple.layers is not None else layers,
        "activations": activations if mode.name == "feedback" else config.couple.activations,
    }
    channels = prune.channels
    if channels == "auto" and (prune.reduction == 1 or "hidden" in prune.whole):
        channels = "select"  # all of them
    elif channels == "auto":
        projected = "gradient_pca" if config.score.importance == "fisher" else "pca"
        channels = "select" if mode.reads_alone else projected
    return config.model_copy(
        update={
            "couple": config.couple.model_copy(update=chosen),
            "prune": prune.model_copy(update={"channels": channels}),
        }
    )


def check_settings(config: RunConfig) -> None:
    """Refuse what does not go together, once the mode's defaults are written out (`resolve`). Raises ConfigError."""
    _check_bridge_use(config)
    _check_models(config)
    check_acting(config)


def check_task(config: RunConfig, kind: str) -> None:
    """Refuse a task that cannot be, whatever its rows. Raises ConfigError."""
    task = own_task(config.task) if isinstance(config.task, TaskConfig) else load_task(config.task)
    check_metrics(task.metrics)
    check_probe(config, task, kind)


def check_probe(config: RunConfig, task: Task, kind: str) -> None:
    """Refuse a probe of a task whose answers such models write. Raises ConfigError."""
    if config.evaluate.probe and task.form(kind).generate is not None:
        raise ConfigError(
            f"evaluate.probe chooses among options, but in task '{task.name}' {kind} models write their answers; "
            "set it to false"
        )


def _check_bridge_use(config: RunConfig) -> None:
    if config.resident == "none" and config.load_in is not None:
        raise ConfigError(
            f"resident is 'none', but large.load_in '{config.load_in}' keeps quantised weights on the device; "
            "use one of the two"
        )
    mode, channels = find_mode(config.couple.mode), config.prune.channels
    if mode.reads_alone and channels != "select":
        raise ConfigError(
            f"prune.channels is '{channels}', but in mode '{mode.name}' the Bridge must be a model by itself; "
            "use channels: select"
        )
    if channels != "select" and "hidden" in config.prune.whole:
        raise ConfigError(
            f"prune.channels is '{channels}', but prune.whole keeps the residual stream, so there is none to choose; "
            "use channels: auto"
        )
    trains = mode.trains_bridge and config.couple.bridge == "train" and config.couple.steps > 0
    if config.prune.weight_bits != 16 and (trains or config.repair is not None):
        why = f"mode '{mode.name}' trains it; use bridge: freeze" if config.repair is None else "`repair:` trains it"
        raise ConfigError(f"prune.bits is {config.prune.bits}, but a packed Bridge cannot train, and {why}")
    if config.couple.cache != "off" and not mode.caches:
        raise ConfigError(
            f"couple.cache is '{config.couple.cache}', but mode '{mode.name}' keeps no activations; leave it off"
        )
    if config.couple.layer_map != "uniform" and config.couple.plug == "fresh":
        raise ConfigError("couple.layer_map maps small layers, but a fresh start takes none; use plug: random or ridge")
    if config.couple.down == "learned" and mode.name in ("feedback", "identity", "mezo", "backprop"):
        raise ConfigError(
            f"couple.down is 'learned', but in mode '{mode.name}' no loss goes through down; use down: select"
            f"{', and a `repair:` section to fit the Bridge' if mode.has_bridge else ''}"
        )
    if channels == "gradient_pca" and config.score.importance != "fisher":
        raise ConfigError(
            f"prune.channels is 'gradient_pca', but score.importance '{config.score.importance}' takes no gradients; "
            "use importance: fisher, or channels: pca"
        )


def _check_models(config: RunConfig) -> None:
    probe = (config.evaluate.probe, "evaluate.probe: true")
    needs = {
        "large_tuned": (config.ceiling is not None, "a `ceiling:` section"),
        "large_probe": probe,
        "small_probe": probe,
        "large_proxy": (config.evaluate.proxy, "evaluate.proxy: true"),
    }
    for name in BaselinesConfig.model_fields:
        needs[name] = (getattr(config.baselines, name) is not None, f"a `baselines.{name}:` section")
    mode = find_mode(config.couple.mode)
    needs["bridge_coupled"] = (mode.trains_bridge, f"a mode whose Bridge trains; in '{mode.name}' it is no model")
    asked = config.evaluate.models
    for name in asked or ():
        given, section = needs.get(name, (True, ""))
        if not given:
            raise ConfigError(f"evaluate.models names '{name}', which needs {section}")
    if config.evaluate.probe and asked is not None and not {"small_probe", "large_probe"} & set(asked):
        raise ConfigError(
            "evaluate.probe is True, but evaluate.models names neither 'small_probe' nor 'large_probe'; add one, or "
            "leave evaluate.probe out"
        )
    if config.evaluate.proxy and asked is not None and "large_proxy" not in asked:
        raise ConfigError(
            "evaluate.proxy is True, but evaluate.models does not name 'large_proxy'; add it, or leave "
            "evaluate.proxy out"
        )


def room_in(config: RunConfig, positions: int | None) -> int | None:
    """Tokens that a row may have: what a model's positions leave, and no more than was asked for."""
    method = find_method(config.method.name)
    rank = config.method.rank if config.method.rank is not None else method.rank
    reserved = rank if method.stacked else 0  # a prefix takes positions of its own
    limits = [] if positions is None else [positions - reserved]
    return min([*limits, *([] if config.max_length is None else [config.max_length])], default=None)


def check_length(config: RunConfig, length: int) -> None:
    """Refuse rows of more tokens than a run gives its models, as far as `config.json` says. Raises ConfigError."""
    for source in (config.small, config.large_path):
        raw = read_model_config(source)
        room = room_in(config, positions_told(raw))
        if room is not None and length > room:
            raise ConfigError(too_many(length, room, source))


def positions_told(raw: Mapping[str, Any]) -> int | None:
    """The longest sequence a model's positions allow; None for relative positions, or where nothing is said."""
    found = [raw[name] for name in POSITIONS if raw.get("model_type") != "t5" and raw.get(name) is not None]
    return int(found[0]) if found else None


POSITIONS = ("n_positions", "max_position_embeddings")


def too_many(tokens: int, room: int, source: str) -> str:
    """What is said of rows that are longer than a model's room."""
    return f"rows of {tokens} tokens are longer than the {room} that a run gives {source}"


def most_of(config: RunConfig) -> dict[str, int]:
    """The most tokens of a row, where it was said; a run's digests have it."""
    return {} if config.max_length is None else {"max_length": config.max_length}


def _read_task(config: RunConfig, data: Path | None, kind: str) -> tuple[Task, dict[Split, list[Any]], dict[str, str]]:
    if isinstance(config.task, TaskConfig):
        task = own_task(config.task)
        texts, paths = own_rows(config.task, task, kind, config.seed)
    else:
        task = load_task(config.task)
        folder = data if data is not None else (Path(config.data) if config.data else None)
        if from_hub(folder) and not task.shipped:
            texts, digests = hub_rows(task, kind, config.seed)
            return task, dict(texts), digests
        texts = load_rows(task, kind, folder, config.seed)
        paths = input_files(task, folder)
    return task, dict(texts), {name: file_digest(path) for name, path in paths.items()}
