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

import argparse
import shlex
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from plugbridge.config import load_config
from plugbridge.files import write_json, write_text
from plugbridge.models import quiet_transformers
from plugbridge.prepare import Prepared, prepare
from plugbridge.shrink.packing import load_bridge, matrices_of
from plugbridge.stages.couple import read_coupled
from plugbridge.stages.work import read_plan
from plugbridge.tasks.encode import IGNORE, Encoded, gold
from plugbridge.train import drawn
from plugbridge.transfer import through
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, drop_vocabulary, require_gradients
from plugbridge.transfer.fidelity import WaysBack, fidelity
from plugbridge.transfer.start import fresh_start
from plugbridge.tuners.module import Module

BOUNDS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3)
HELD = (0.9, 0.99)
ROWS = 32


def coupling_of(root: Path, prepared: Prepared, module: Module) -> Coupling:
    """The coupling of a run with a module in it."""
    large, layout = prepared.load_run_only()
    bridge = load_bridge(root / "prune" / "bridge")
    drop_vocabulary(bridge, layout)
    coupling = Coupling(
        method=prepared.method, settings=prepared.settings, small=layout, large=layout, plan=read_plan(root),
        bridge=bridge, encoder=prepared.large_encoder, module={slot: t.clone() for slot, t in module.items()},
        plug={}, down={}, train_bridge=False, large_model=large, activations="large",
    )  # fmt: skip
    require_gradients(coupling)
    return coupling


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


@contextmanager
def errors_of(coupling: Coupling) -> Generator[dict[str, list[Tensor]]]:
    """Squared norms of the errors at what every block's matrices give, by block."""
    large = coupling.large_model
    assert large is not None
    found: dict[str, list[Tensor]] = defaultdict(list)

    def take(block: str, error: Tensor) -> None:
        found[block].append(error.detach().square().sum(-1))

    def hook(block: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(take, block))

    with ExitStack() as hooks:
        for path in matrices_of(large, coupling.large):
            stack, layer = cast(tuple[str, int], coupling.large.block_of(path))
            handle = large.get_submodule(path).register_forward_hook(partial(hook, f"{stack} {layer}"))
            hooks.callback(handle.remove)
        yield found


def share_that_holds(squares: Sequence[Tensor], held: float, positions: dict[int, int]) -> float:
    """The share of the positions that hold so much of the squared norm, a mean over matrices."""
    shares = []
    for each in squares:
        ordered = each.flatten().sort(descending=True).values.double()
        if float(ordered[0]) > 0:
            enough = int((ordered.cumsum(0) < held * ordered.sum()).sum()) + 1
            shares.append(enough / positions[each.shape[1]])
    return sum(shares) / len(shares)


def by_block(root: Path, prepared: Prepared, module: Module) -> dict[str, list[float]]:
    """Shares of the positions that hold `HELD`, by block."""
    coupling = coupling_of(root, prepared, module)
    rows = rows_of(prepared)
    positions = positions_of(coupling, rows)
    with errors_of(coupling) as found:  # before a module is attached
        loss = MODES["feedback"].start(coupling)
        torch.autograd.grad(loss(rows), list(coupling.module.values()))
    return {block: [share_that_holds(squares, held, positions) for held in HELD] for block, squares in found.items()}


def by_bound(root: Path, prepared: Prepared, module: Module, bound: float) -> tuple[float, float]:
    """The share of positions that are sent, and the cosine with the exact gradient."""
    coupling = replace(coupling_of(root, prepared, module), error_bound=bound)
    rows = rows_of(prepared)
    sent: list[tuple[int, int]] = []
    own = through.carrying

    def counted(errors: Tensor, limit: float) -> Tensor | None:
        kept = own(errors, limit)
        sent.append((len(errors) if kept is None else len(kept), len(errors)))
        return kept

    through.carrying = counted
    try:
        ways = MODES["feedback"].start(coupling)
        assert isinstance(ways, WaysBack)
        cosine = fidelity(coupling, ways, rows, 0, len(rows)).means()[0]
    finally:
        through.carrying = own
    positions = positions_of(coupling, rows)
    whole = sum(positions[count // len(rows)] for _, count in sent)
    return sum(kept for kept, _ in sent) / whole, cosine


def measured(root: Path, data: Path | None) -> dict[str, Any]:
    """All of one run."""
    prepared = prepare(load_config(root / "config.yaml"), data)
    torch.manual_seed(prepared.config.seed)
    layout = prepared.without_weights[prepared.config.large_path][1]
    start = fresh_start(prepared.method, prepared.settings, layout, prepared.load_to_fit()[0]).module
    modules = {"start": start, "end": read_coupled(root / "couple" / "coupled.safetensors")[0]}
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


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of feedback with activations: large")
    parser.add_argument("--data", type=Path, help="directory of the tasks' files")
    parser.add_argument("--table", type=Path, help="Markdown file to write, with a JSON file beside it")
    args = parser.parse_args()
    quiet_transformers()
    found = [measured(root, args.data) for root in args.runs]
    asked = shlex.join(map(str, args.runs)) + " --data DIR" * (args.data is not None)
    print(page(found, asked))
    if args.table:
        write_text(args.table, page(found, asked))
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
