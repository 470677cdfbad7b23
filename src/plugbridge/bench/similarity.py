"""How alike modules tuned on different models are (Jin et al. 2023, Figure 1b).

Modules of unequal shape are compared by what they add to a weight, and the smaller one is carried to the large
model's width first: by maps fitted to both models' states on the same tokens (orthogonal Procrustes), the small
model's layers spread evenly. The paper does not say how it compared them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plugbridge.bench.grid import nested
from plugbridge.bench.paper import Choice
from plugbridge.config import RunConfig, apply_override, parse_config
from plugbridge.errors import ConfigError
from plugbridge.files import write_atomically
from plugbridge.parsing import shown
from plugbridge.transfer.acting import without_idle_steps

PRODUCTS = {
    "lora": ("lora_B.weight", "lora_A.weight"),
    "adapter": ("adapter_up.weight", "adapter_down.weight"),
}
"""The two factors of what a method adds to a weight (of an adapter: without its nonlinearity)."""
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Likeness:
    """Cosine of two modules' changes at one place of the large model, and what was compared."""

    compared: str
    place: str
    cosine: float


def similarity_configs(choice: Choice, task: str, method: str) -> dict[str, RunConfig]:
    """Runs whose modules are compared: fitted and random plugs, each without coupling, and another seed's ceiling.

    Raises ConfigError for a method whose tensors are no product.
    """
    if method not in PRODUCTS:
        raise ConfigError(f"figure 1b compares {' and '.join(PRODUCTS)} modules, not {shown(method)}")

    def config(plug: str, seed: int) -> RunConfig:
        settings: dict[str, Any] = {
            "small": choice.pair.small, "large": choice.pair.large, "task": task, "seed": seed, "method.name": method,
            "prune.budget": 1 / 16, "couple.mode": "standalone", "couple.plug": plug,
            "ceiling": {}, "evaluate.models": ["small_tuned", "large_plugged", "large_tuned"],
        }  # fmt: skip
        raw = nested(settings)
        for override in (*choice.sets, "couple.steps=0"):  # whatever was asked: plugs are compared, not couplings
            raw = apply_override(raw, override)
        return without_idle_steps(parse_config(raw, "reproduce"))

    return {
        f"{task}-{method}-procrustes": config("procrustes", choice.seed),
        f"{task}-{method}-random": config("random", choice.seed),
        f"{task}-{method}-other-seed": config("random", choice.seed + 1),
    }


def compare(method: str, fitted: Path, random: Path, other: Path) -> list[Likeness]:
    """Cosines at every place, from three finished runs (see `similarity_configs`)."""
    large = changes(method, load_file(str(fitted / "ceiling" / "module" / WEIGHTS)))
    sides = {
        "small and large": changes(method, load_file(str(fitted / "plug" / "checkpoint" / WEIGHTS))),
        "control: small behind a random plug": changes(
            method, load_file(str(random / "plug" / "checkpoint" / WEIGHTS))
        ),
        "large and large of another seed": changes(method, load_file(str(other / "ceiling" / "module" / WEIGHTS))),
    }
    return [Likeness(name, place, cosine(side[place], large[place])) for name, side in sides.items() for place in large]


def changes(method: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint's module adds to each weight, up to a factor: (out, in) by place."""
    second, first = PRODUCTS[method]
    return {
        key.removesuffix(f".{second}").removeprefix("base_model.model."): tensor.double()
        @ state[f"{key.removesuffix(second)}{first}"].double()
        for key, tensor in state.items()
        if key.endswith(second)
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of one shape as vectors; 0 if either is zero."""
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 0.0


def draw_likeness(found: Mapping[str, list[Likeness]], path: Path) -> None:
    """For each title a panel, a line of cosines over the large model's places for each comparison.

    PNG or SVG by the path's ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4 * len(found)), layout="constrained")
    colours = ("#c1440e", "#8a8a8a", "#3b6ea5")
    for panel, (title, likenesses) in enumerate(found.items(), 1):
        axes = figure.add_subplot(len(found), 1, panel)
        for name, colour in zip(dict.fromkeys(f.compared for f in likenesses), colours, strict=True):
            values = [f.cosine for f in likenesses if f.compared == name]
            mean = sum(values) / len(values)
            places = range(1, len(values) + 1)
            axes.plot(places, values, marker="o", ms=4, color=colour, label=f"{name} (mean {mean:.2f})")
        axes.axhline(0, color="#222222", lw=0.8)
        axes.set_ylim(-1.05, 1.05)
        axes.set_xlabel("place in the large model, from the bottom")
        axes.set_ylabel("cosine of what the modules add")
        axes.set_title(title, fontsize=10, loc="left")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150)


def mean_by_comparison(found: list[Likeness]) -> dict[str, float]:
    """The mean cosine of each comparison."""
    names = dict.fromkeys(f.compared for f in found)
    return {name: torch.tensor([f.cosine for f in found if f.compared == name]).mean().item() for name in names}
