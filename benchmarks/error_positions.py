"""At how many positions must the error go back?

A row of a classification has its loss at one position. How many others carry the error, block by block, and what is
lost if a Bridge of few bits sends back only those that carry most of it (`couple.error_bound`)? Of finished runs of
feedback with `activations: large`, with the module at its start and as it was trained, on training rows drawn by the
seed, all of a batch at once as in a step:

- *by block*: the share of the positions, padding left out, that hold 90 and 99 % of the squared norm of the errors at
  what a block's matrices give;
- *by bound*: the share of the positions that are multiplied with the Bridge's matrices, and the cosine of the module's
  gradient with the exact one, a mean over its layers.

    plugbridge run configs/gpt2-lora.yaml --set prune.reduction=1 --set prune.bits=3 --out runs/gpt2
    python benchmarks/error_positions.py runs/gpt2 --table docs/results/error_positions.md
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from finished_runs import coupling_of, measure_runs, opened
from torch import Tensor

from plugbridge.prepare import Prepared
from plugbridge.shrink.packing import matrices_of
from plugbridge.tasks.encode import IGNORE, Encoded, gold
from plugbridge.train import drawn
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling
from plugbridge.transfer.fidelity import WaysBack, fidelity
from plugbridge.transfer.through import carrying
from plugbridge.tuners.module import Module

BOUNDS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3)
HELD = (0.9, 0.99)
ROWS = 32


def rows_of(prepared: Prepared) -> list[Encoded]:
    """The rows that errors are looked at on."""
    return drawn(prepared.large_rows["train"], ROWS, prepared.config.seed)


def positions_of(coupling: Coupling, rows: list[Encoded]) -> dict[int, int]:
    """How many positions of a batch are no padding, by the length that it is filled up to."""
    batch = gold(coupling.encoder, rows)
    read = {batch.input_ids.shape[1]: int(batch.attention_mask.sum())}
    if coupling.encoder.kind == "seq2seq":
        read = {batch.labels.shape[1]: int((batch.labels != IGNORE).sum()), **read}
    return read


def errors_of(coupling: Coupling, rows: list[Encoded]) -> dict[str, list[Tensor]]:
    """The errors at what every block's matrices give, (n, length, width) each, by block."""
    large = coupling.large_model
    assert large is not None
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hook(block: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(found[block].append)

    for path in matrices_of(large, coupling.large):  # before a module is attached
        stack, layer = cast(tuple[str, int], coupling.large.block_of(path))
        large.get_submodule(path).register_forward_hook(partial(hook, f"{stack} {layer}"))
    loss = MODES["feedback"].start(coupling)
    torch.autograd.grad(loss(rows), list(coupling.module.values()))
    return found


def share_that_holds(errors: Sequence[Tensor], held: float, positions: dict[int, int]) -> float:
    """The share of the positions that hold so much of the squared norm, a mean over matrices."""
    shares = []
    for each in errors:
        ordered = each.square().sum(-1).flatten().sort(descending=True).values.double()
        if float(ordered[0]) > 0:
            enough = int((ordered.cumsum(0) < held * ordered.sum()).sum()) + 1
            shares.append(enough / positions[each.shape[1]])
    return sum(shares) / len(shares)


def by_block(root: Path, prepared: Prepared, module: Module) -> dict[str, list[float]]:
    """Shares of the positions that hold `HELD`, by block."""
    coupling = coupling_of(root, prepared, module)
    rows = rows_of(prepared)
    positions = positions_of(coupling, rows)
    found = errors_of(coupling, rows)
    return {block: [share_that_holds(errors, held, positions) for held in HELD] for block, errors in found.items()}


def by_bound(root: Path, prepared: Prepared, module: Module, bound: float) -> tuple[float, float]:
    """The share of positions that are sent, and the cosine with the exact gradient."""
    rows = rows_of(prepared)
    coupling, again = (replace(coupling_of(root, prepared, module), error_bound=bound) for _ in range(2))
    positions = positions_of(coupling, rows)
    sent = whole = 0
    for error in (each for errors in errors_of(coupling, rows).values() for each in errors):
        kept = carrying(error.reshape(-1, error.shape[-1]), bound)
        sent += error[..., 0].numel() if kept is None else len(kept)
        whole += positions[error.shape[1]]
    ways = MODES["feedback"].start(again)
    assert isinstance(ways, WaysBack)
    return sent / whole, fidelity(again, ways, rows, 0, len(rows)).means()[0]


def measured(root: Path, data: Path | None) -> dict[str, Any]:
    """All of one run."""
    prepared, layout, modules = opened(root, data)
    lengths = [len(row.prompt) for row in rows_of(prepared)]
    return {
        "task": prepared.task.name,
        "family": layout.family.name,
        "bits": prepared.config.prune.weight_bits,
        "positions": sum(lengths) / len(lengths),
        "blocks": {when: by_block(root, prepared, module) for when, module in modules.items()},
        "bounds": {
            when: {bound: by_bound(root, prepared, module, bound) for bound in BOUNDS}
            for when, module in modules.items()
        },
    }


def page(found: list[dict[str, Any]], asked: str) -> str:
    """What was measured, as Markdown, and what was asked for."""
    lines: list[str] = []
    for run in found:
        title = f"{run['family']}, {run['task']}, {run['bits']} bits, prompts of {run['positions']:.0f} tokens"
        lines += [
            "",
            f"## {title}",
            "",
            "| block | "
            + " | ".join(f"{when}, {held:.0%} of the norm" for when in run["blocks"] for held in HELD)
            + " |",
            "|---" * 5 + "|",
        ]
        for block in sorted(
            run["blocks"]["start"], key=lambda name: (name.split()[0] == "decoder", int(name.split()[1]))
        ):
            cells = [f"{share:.2f}" for shares in run["blocks"].values() for share in shares[block]]
            lines.append(f"| {block} | " + " | ".join(cells) + " |")
        lines += ["", "| bound | start: sent | cosine | end: sent | cosine |", "|---" * 5 + "|"]
        for bound in BOUNDS:
            cells = [
                f"{value:.{digits}f}"
                for each in run["bounds"].values()
                for value, digits in zip(each[bound], (2, 3), strict=True)
            ]
            lines.append(f"| {bound:g} | " + " | ".join(cells) + " |")
    about = (__doc__ or "").partition("    plugbridge run")[0]
    made = f"Made by\n\n    python benchmarks/error_positions.py {asked}\n"
    return "# Positions that carry the error\n" + about.partition("\n")[2] + made + "\n".join(lines) + "\n"


if __name__ == "__main__":
    measure_runs(__doc__ or "", measured, page)
