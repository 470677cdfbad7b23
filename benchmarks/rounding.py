"""Which rounding of the Bridge lasts while a module trains?

A Bridge of the large model's width is rounded to few bits, each weight to its nearest level or calibrated to the errors
that `score` recorded (GPTQ on the transpose) with so much damping, a share of the second moment's mean. Compared is the
gradient through it with the exact one, for the module at its start and as it was trained: the cosine, a mean over the
module's layers, on training rows. The errors were recorded before the module trained, so a rounding that fits them too
closely is good at the start and not at the end. Of finished runs of feedback with a packed Bridge of full width.

    plugbridge run configs/gpt2-lora.yaml --set prune.reduction=1 --set prune.bits=2 --out runs/gpt2
    python benchmarks/rounding.py runs/gpt2 --table docs/results/rounding.md
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finished_runs import coupling_of, measure_runs, opened
from torch import Tensor
from transformers import PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.prepare import Prepared
from plugbridge.shrink.packing import matrices_of
from plugbridge.shrink.rounding import calibrated
from plugbridge.shrink.vectors import read_vectors
from plugbridge.stages.shrink import VECTORS
from plugbridge.stages.work import read_plan
from plugbridge.tensors.packed import Bits, pack
from plugbridge.train import drawn
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import drop_vocabulary
from plugbridge.transfer.fidelity import WaysBack, fidelity

ROWS = 64
BITS: tuple[Bits, ...] = (3, 2)
DAMPINGS = (0.01, 0.05, 0.3, 1.0, 3.0)
Rounding = Callable[[str, Tensor], Tensor]
"""A layer's path and its matrix (outputs, inputs) to the matrix rounded."""


def rounded(prepared: Prepared, layout: Layout, rounding: Rounding) -> PreTrainedModel:
    """The large model with its blocks' matrices rounded, embeddings and head taken away."""
    bridge = prepared.load(prepared.config.large_path)[0].requires_grad_(False)
    turned = layout.family.linear == "in out"
    for path in matrices_of(bridge, layout):
        weight = bridge.get_submodule(path).get_parameter("weight")
        found = rounding(path, weight.data.mT.contiguous() if turned else weight.data)
        weight.data = found.mT.contiguous() if turned else found
    drop_vocabulary(bridge, layout)
    return bridge


def roundings(root: Path, layout: Layout, bits: Bits) -> dict[str, Rounding]:
    """All that are compared, by name."""
    plan = read_plan(root)

    def to_nearest(_path: str, matrix: Tensor) -> Tensor:
        return pack(matrix, bits).unpack()

    def by(damping: float) -> Rounding:
        def rounding(path: str, matrix: Tensor) -> Tensor:
            vectors = read_vectors(root / "score" / VECTORS, "errors", layout, plan, path)
            return calibrated(matrix, bits, vectors, damping).unpack()

        return rounding

    return {"to nearest": to_nearest, **{f"calibrated, damping {damping:g}": by(damping) for damping in DAMPINGS}}


def measured(root: Path, data: Path | None) -> dict[str, Any]:
    """All of one run."""
    prepared, layout, modules = opened(root, data)
    rows = drawn(prepared.large_rows["train"], ROWS, prepared.config.seed + 1)
    cosines: dict[str, dict[str, float]] = {}
    for bits in BITS:
        for name, rounding in roundings(root, layout, bits).items():
            bridge = rounded(prepared, layout, rounding)
            found: dict[str, float] = {}
            for when, module in modules.items():
                coupling = replace(coupling_of(root, prepared, module), bridge=bridge)
                ways = MODES["feedback"].start(coupling)
                assert isinstance(ways, WaysBack)
                found[when] = fidelity(coupling, ways, rows, 0, len(rows)).means()[0]
            cosines[f"{bits} bits {name}"] = found
            print(root, bits, name, found, flush=True)
    return {"task": prepared.task.name, "family": layout.family.name, "seed": prepared.config.seed, "cosines": cosines}


def page(found: list[dict[str, Any]], asked: str) -> str:
    """What was measured, as Markdown, and what was asked for."""
    titles = [
        f"{run['family']}, {run['task']}, seed {run['seed']}: {when}" for run in found for when in ("start", "end")
    ]
    lines = ["", "| Bridge | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name in found[0]["cosines"]:
        cells = [f"{run['cosines'][name][when]:.3f}" for run in found for when in ("start", "end")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = (__doc__ or "").partition("    plugbridge run")[0]
    made = f"Made by\n\n    python benchmarks/rounding.py {asked}\n"
    return f"# Rounding for errors that change\n\n{about}{made}" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    measure_runs(__doc__ or "", measured, page)
