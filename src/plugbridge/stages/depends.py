"""What the stages of a run depend on; needs neither a model nor torch.

`build` gives the stages their work, `recorded` compares what they depend on with what a run was done with before. Some
of it only a tokenizer or a device tells: it is `UNTOLD` until then.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from plugbridge.config import PartsConfig, RunConfig, TrainConfig
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.needed import couple_needs, passing, stages_of
from plugbridge.tuners.table import Method, MethodSettings

DRAWN = "drawn by the seed"
"""How some training rows are chosen; earlier versions took the first, and their results are not these."""
UNSEEN = ("checkpoint_every", "keep", "micro_batch", "recompute", "bridge_resident", "fidelity_every")
"""Keys that change no result, beyond rounding; `micro_batch` does with dropout, and is then named beside them."""
LATER: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw",),
    "bits": (16, None),
    "whole": ([],),
    "rounding": ("calibrated",),
    "activations": ("bridge", None),
    "error_bound": (0.0,),
    "kept_bits": (None,),
    "perturbation": (1e-3,),
    "fidelity_rows": (8,),
    "proxy": (False,),
}
"""Keys that came later, and what they are where a run from before them has none: such a run need not be done anew."""
RATES = {"finetuned": 1e-4, "ladder": 3e-3}
"""Peak learning rates by default, for models of usual size: on the embedded large models the best for all weights, and
for a ladder within noise of the best. The embedded small models, of 0.2M parameters, are fine-tuned best at 3e-3."""


Size = Literal["small", "large"]


class Untold:
    """What takes more than files and settings to tell."""


UNTOLD: Final = Untold()


@dataclass(frozen=True)
class Part:
    """A stage without its work: its name, the stages it reads, what it depends on."""

    name: str
    needs: tuple[str, ...]
    depends: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a run's stages depend on as a whole; `drops` tells whether a model in training drops some of its numbers.

    `inputs` are the digests of `small`, `large` and `task`.
    """

    config: RunConfig
    method: Method
    settings: MethodSettings
    device: str | Untold
    inputs: Mapping[str, Any]
    drops: Callable[[str], bool | Untold]


def parts_of(asked: Asked, only: str | None = None) -> list[Part]:
    """The stages of a run in order, with what each depends on: those that make the models to be scored.

    Where `only` one will be run, all that the configuration has.
    """
    config, small, large = asked.config, asked.inputs["small"], asked.inputs["large"]
    common = {"seed": config.seed, "device": asked.device, "dtype": config.dtype, "task": asked.inputs["task"]}
    settings = asked.settings
    method = {
        "name": asked.method.name, "rank": settings.rank, "alpha": settings.alpha, "dropout": settings.dropout,
    }  # fmt: skip
    # only where it is set, so that runs from before the key keep their digests
    bits = {} if config.load_in is None else {"load_in": config.load_in}
    tuning = {
        "small": small,
        "method": method,
        "tune": _dump(config.tune),
        "rate": rate_of_training(config.tune, asked.method),
        **_parts(asked, config.tune, config.small),
    }
    reads_tokens = find_mode(config.couple.mode).reads_tokens
    pruning = {"large": large, "prune": _dump(config.prune), "reads_tokens": reads_tokens}
    found: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("tune", (), tuning),
        ("score", (), {"large": large, "score": _dump(config.score), "rows": DRAWN, **_passing(config)}),
        ("prune", ("score",), pruning),
    ]
    if config.repair is not None:
        found.append(("repair", ("prune",), {"large": large, **bits, "repair": _dump(config.repair)}))
    coupling = {
        "large": large,
        "method": method,
        "couple": _dump(config.couple),
        "rate": rate_of_training(config.couple, asked.method),
        **({"rows": DRAWN} if alignment_passes(config) else {}),
        **_parts_of_coupling(asked),
        **(bits if uses_large(config) else {}),
    }
    found.append(("couple", couple_needs(config), coupling))
    coupled: tuple[str, ...] = ("couple",)
    if config.polish is not None:
        found.append(("polish", coupled, {"large": large, **bits, "polish": config.polish.model_dump()}))
        coupled = ("couple", "polish")
    found.append(("plug", coupled, {"large": large, "source": config.large_path}))
    results: tuple[str, ...] = ("tune", "prune", "repair", *coupled, "plug")
    if config.ceiling is not None:
        reference = {
            "large": large,
            "method": method,
            "ceiling": _dump(config.ceiling),
            "rate": rate_of_training(config.ceiling, asked.method),
            **_parts(asked, config.ceiling, config.large_path),
        }
        found.append(("ceiling", (), reference))
        results = (*results, "ceiling")
    for name, depends in _baselines(asked):
        found.append((name, (), depends))
        results = (*results, name)
    wanted = stages_of(config)
    results = tuple(name for name in results if name in wanted)
    limited = {} if config.evaluate.limit is None else {"rows": "drawn alike"}  # earlier versions took the first
    scoring = {"small": small, "large": large, **bits, "evaluate": _dump(config.evaluate), **limited}
    found.append(("evaluate", results, scoring))
    parts = [Part(name, needs, {**common, **depends}) for name, needs, depends in found]
    return parts if only is not None else [part for part in parts if part.name in wanted]


def model_names(config: RunConfig) -> list[str]:
    """The models that a configuration has, probes left out, in the order of its report."""
    coupled = ["bridge_coupled"] if find_mode(config.couple.mode).trains_bridge else []
    tuned = ["large_tuned"] if config.ceiling is not None else []
    others = [name for name, *_ in baselines_of(config)]
    proxy = ["large_proxy"] if config.evaluate.proxy else []
    return ["small_zero_shot", "small_tuned", "large_zero_shot", *proxy, "large_plugged", *coupled, *tuned, *others]


def baselines_of(config: RunConfig) -> Iterator[tuple[str, Size, str, PartsConfig]]:
    """Name, size, kind and settings of every baseline that the configuration asks for."""
    sizes: tuple[Size, ...] = ("small", "large")
    for size in sizes:
        for kind in ("finetuned", "ladder"):
            settings: PartsConfig | None = getattr(config.baselines, f"{size}_{kind}")
            if settings is not None:
                yield f"{size}_{kind}", size, kind, settings


def _baselines(asked: Asked) -> Iterator[tuple[str, dict[str, Any]]]:
    config = asked.config
    for name, size, kind, settings in baselines_of(config):
        source = config.small if size == "small" else config.large_path
        depends = {
            "model": asked.inputs[size], "baseline": _dump(settings), "rate": rate_of_baseline(kind, settings),
        }  # fmt: skip
        depends |= _parts(asked, settings, source, with_module=False)
        if kind == "ladder":
            depends |= {"score": _dump(config.score), "rows": DRAWN}
        yield name, depends


def _passing(config: RunConfig) -> dict[str, Any]:
    """What scoring keeps for a packed Bridge's rounding, where it keeps something."""
    kind = passing(config)
    return {} if kind is None else {"vectors": kind}


def rate_of_training(train: TrainConfig, method: Method) -> float:
    """The peak learning rate of a training: as configured, or the method's default."""
    return train.learning_rate if train.learning_rate is not None else method.learning_rate


def rate_of_baseline(kind: str, settings: TrainConfig) -> float:
    """The peak learning rate of a baseline: as configured, or its default."""
    return settings.learning_rate if settings.learning_rate is not None else RATES[kind]


def uses_large(config: RunConfig) -> bool:
    """Whether coupling loads the large model: to run it, or to start from it."""
    return find_mode(config.couple.mode).runs_large or config.couple.plug == "fresh" or alignment_passes(config) > 0


def alignment_passes(config: RunConfig) -> int:
    """How often coupling runs both models on some rows first, to start from what their states have in common."""
    settings = config.couple
    if settings.plug == "fresh":
        return 0
    return (settings.plug != "random") + (settings.layer_map != "uniform")


def _parts(asked: Asked, settings: PartsConfig, source: str, with_module: bool = True) -> dict[str, Any]:
    """How many rows go through a model at a time, where they drop other numbers together than one by one."""
    number = micro_batch_of(settings)
    if not number or (with_module and asked.settings.dropout > 0):
        return number
    drops = asked.drops(source)
    if isinstance(drops, Untold):
        return {"micro_batch": UNTOLD}
    return number if drops else {}


def _parts_of_coupling(asked: Asked) -> dict[str, Any]:
    """The same for coupling, where the Bridge has the large model's dropout as far as it trains; or that model does."""
    config, settings = asked.config, asked.config.couple
    mode = find_mode(settings.mode)
    if mode.exact:
        return _parts(asked, settings, config.large_path)
    if not mode.trains_bridge:
        return {}
    if settings.bridge == "freeze":
        return micro_batch_of(settings) if asked.settings.dropout > 0 else {}
    return _parts(asked, settings, config.large_path)


def micro_batch_of(settings: PartsConfig) -> dict[str, Any]:
    """How many rows go through a model at a time, where a step has more."""
    some = settings.micro_batch
    return {} if some is None or some >= settings.batch_size else {"micro_batch": some}


def _dump(section: Any) -> dict[str, Any]:
    """A configuration section as JSON, without what does not change the result."""
    return seen(section.model_dump(mode="json"))


def seen(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a section of it, without the keys that change no result."""
    return {
        key: seen(cast(dict[str, Any], value)) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in UNSEEN and value not in LATER.get(key, ())
    }
