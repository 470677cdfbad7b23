"""What one training step takes: feedback against LoRA on the same large model, in one run.

Each step is measured in a process of its own: peak memory with all models that it holds (resident, over the process
before any model, freed blocks given back; on a card allocated), and seconds, medians over the steps after the first.
With several rounds all steps take turns, and ratios are medians over the rounds. The model is GPT-2-shaped with
random weights, LoRA is r = 8 on the attention inputs, rows are full length. Feedback's modules sit in the top three
quarters of the layers, its default, or in all; `kept` has `couple.recompute: false`. The Bridge is a quarter as wide;
its residual stream is a projection, as by default (`prune.channels: gradient_pca`; here on random directions), or
`selected channels` of the large model's (`prune.channels: select`). LoRA steps are as transformers and peft do them;
feedback computes GPT-2's GELU in one kernel, not eight, which would save a LoRA step time, too.

    python benchmarks/step_memory.py --table docs/results/step_memory.md

With `--only` some of the steps can be measured in more rounds than the others. What the table's JSON has of the same
steps is not measured again; remove the file to begin anew.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from plugbridge.cost import measure, settle
from plugbridge.evaluate import mean_loss
from plugbridge.files import write_json, write_text
from plugbridge.memory.measure import GIVEN_BACK
from plugbridge.models import checkpoint_activations, layout_for, load_tokenizer
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import magnitude
from plugbridge.shrink.prune import plan_bridge, principal_basis
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, require_gradients
from plugbridge.tuners.module import attach, state_of, trainable, unpack
from plugbridge.tuners.table import METHODS, MethodSettings

ROOT = Path(__file__).resolve().parent.parent
LORA, CHECKPOINTING = "LoRA", "LoRA, checkpointing"
KINDS = (
    LORA,
    CHECKPOINTING,
    "feedback",
    "feedback, kept",
    "feedback, kept, selected channels",
    "feedback, all layers",
    "feedback, all layers, kept",
)
SETTINGS = MethodSettings(8, 16.0)
SAME = ("hidden", "layers", "vocabulary", "batch", "length", "steps", "threads", "device", "dtype", "here")
"""Arguments that two calls must share for measurements of one to stand in the other's table."""
CHANNELS = "gradient_pca"
"""A Bridge's residual stream where a kind does not say; tables from when it was `select` are made anew."""
Done = dict[str, list[dict[str, Any] | None]]
"""A kind's measurements, round by round; none where it failed."""


def model_of(args: argparse.Namespace) -> PreTrainedModel:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.length,
        n_embd=args.hidden, n_layer=args.layers, n_head=args.hidden // 64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device(args.device):
        return GPT2LMHeadModel(config).to(getattr(torch, args.dtype)).eval()


def rows_of(args: argparse.Namespace) -> list[Encoded]:
    """Full-length rows; only the last token is predicted."""
    ids = torch.randint(5, 2000, (args.batch, args.length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Encoded(tuple(row[:-1]), ((row[-1],), (3,)), 0) for row in ids]


def measured(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the steps of one kind here."""
    torch.set_num_threads(args.threads)
    baseline = settle()
    model, rows = model_of(args), rows_of(args)
    layout = layout_for(model)
    encoder = Encoder(load_tokenizer(str(ROOT / "pairs" / "gpt2" / "small")), "causal", None)
    if kind in (LORA, CHECKPOINTING):
        wrapped, _ = attach(model, METHODS["lora"], layout, SETTINGS)
        if kind == CHECKPOINTING:
            checkpoint_activations(model)
            model.enable_input_require_grads()
        wrapped.train()
        parameters = list(trainable(wrapped).values())

        def loss() -> torch.Tensor:
            return mean_loss(wrapped, gold(encoder, rows).to(args.device), "causal")

    else:
        sizes = reduced_sizes(layout, 4)
        plan = plan_bridge(layout, magnitude(model, layout), sizes)
        if "selected" not in kind:
            moments = torch.randn(args.hidden, args.hidden, generator=torch.Generator().manual_seed(0))
            plan = replace(plan, basis={"hidden": principal_basis(moments @ moments.mT, sizes["hidden"])})
            del moments
        plan = plan.to(args.device)
        bridge = prune_model(model, layout, plan, {}).float()
        spare, _ = attach(model_of(args), METHODS["lora"], layout, SETTINGS)
        fresh = {key: tensor.to(args.device) for key, tensor in state_of(spare).items()}
        module = unpack(METHODS["lora"], layout, fresh)
        del spare
        mode = MODES["feedback"]
        first = {} if "all layers" in kind else {"decoder": args.layers - math.ceil(mode.layers * args.layers)}
        coupling = Coupling(
            method=METHODS["lora"], settings=SETTINGS, small=layout, large=layout, plan=plan, bridge=bridge,
            encoder=encoder, module=module, plug={}, down={}, train_bridge=False, large_model=model, first=first,
            recompute="kept" not in kind,
        )  # fmt: skip
        require_gradients(coupling)
        through = mode.start(coupling)
        parameters = [tensor for tensor in module.values() if tensor.requires_grad]

        def loss() -> torch.Tensor:
            return through(rows)

    optimizer = torch.optim.AdamW(parameters)
    seconds: list[float] = []
    cuda = args.device == "cuda"
    settle()  # a model that was only needed to set up must not hide what the steps take
    with measure(args.device, baseline) as cost:
        for _ in range(args.steps):
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    return {"kind": kind, "peak_bytes": cost.peak_bytes, "seconds": median(seconds[1:])}


def measured_apart(kind: str) -> dict[str, Any]:
    """The same in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--kind", kind]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(GIVEN_BACK)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_rounds(args: argparse.Namespace, done: Done, settings: dict[str, Any]) -> set[str]:
    """Measure what is not done, all kinds taking turns; returns those that failed, which are not tried twice."""
    failed: set[str] = set()
    for number in range(args.rounds):
        for kind in args.only or KINDS:
            mine = done.setdefault(kind, [])
            mine += [None] * (number + 1 - len(mine))
            if mine[number] is not None or kind in failed:
                continue
            try:
                mine[number] = measured(kind, args) if args.here else measured_apart(kind)
            except subprocess.CalledProcessError as error:
                failed.add(kind)
                print(f"error: {kind}: {error}", file=sys.stderr)
                continue
            print(mine[number], flush=True)
            if args.table:
                write_json(args.table.with_suffix(".json"), summary(done, settings))
    return failed


def read_done(path: Path | None, settings: dict[str, Any]) -> Done:
    """What an earlier call with the same settings measured."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else []
    return {row["kind"]: row["measured"] for row in rows if row.get("settings") == settings}


def summary(done: Done, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind that was measured: medians over rounds, also of ratios to the first two kinds."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        own = [one for one in done.get(kind, []) if one is not None]
        if not own:
            continue
        row: dict[str, Any] = {"kind": kind, "settings": settings, "measured": done[kind]}
        for key in ("peak_bytes", "seconds"):
            row[key] = median(one[key] for one in own)
            for base in KINDS[:2]:
                pairs = zip(done[kind], done.get(base, []), strict=False)
                ratios = [one[key] / other[key] for one, other in pairs if one is not None and other is not None]
                row[f"{key} to {base}"] = {"rounds": ratios, "median": median(ratios) if ratios else None}
        found.append(row)
    return found


def _ratios(row: dict[str, Any], key: str) -> str:
    medians = [row[f"{key} to {base}"]["median"] for base in KINDS[:2]]
    return " | ".join("" if found is None else f"{found:.2f}" for found in medians)


def main() -> None:
    """Measure every kind and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=2048, help="the model's, 2048 (its default) or more")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the model's weights")
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    parser.add_argument("--here", action="store_true", help="all in this process, to try it out: peaks hide each other")
    parser.add_argument("--only", choices=KINDS, action="append", help="measure only this one; may be repeated")
    parser.add_argument("--kind", choices=KINDS, help="only this one, as a JSON line")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measured(args.kind, args)))
        return
    settings = {name: getattr(args, name) for name in SAME} | {"channels": CHANNELS}
    done = read_done(args.table and args.table.with_suffix(".json"), settings)
    failed = measure_rounds(args, done, settings)
    found = summary(done, settings)
    lines = [
        f"| {row['kind']} | {sum(one is not None for one in row['measured'])} | {row['peak_bytes'] / 2**20:.0f} "
        f"| {_ratios(row, 'peak_bytes')} | {row['seconds']:.3g} | {_ratios(row, 'seconds')} |"
        for row in found
    ]
    about = (__doc__ or "").partition("    python")[0].strip()
    size = f"{args.layers} layers x {args.hidden}, vocabulary {args.vocabulary}, batch {args.batch} x {args.length}"
    size += f", {args.dtype}, {args.device}, {args.threads} thread(s)"
    args.device = "meta"  # shapes are enough to count
    weights = sum(parameter.nbytes for parameter in model_of(args).parameters())
    table = [
        f"# Memory and time of a step\n\n{about}\n\n{size}; the model's weights take {weights / 2**20:.0f} MiB.\n",
        f"Made by\n\n    python benchmarks/step_memory.py {shlex.join(sys.argv[1:])}\n",
        *(["and the other steps by the same without `--only`.\n"] if args.only and len(found) > len(args.only) else []),
        "| step | rounds | peak MiB, models included | / LoRA | / checkpointing | seconds | / LoRA | / checkpointing |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    print("\n".join(lines))
    if args.table:
        write_json(args.table.with_suffix(".json"), found)
        write_text(args.table, "\n".join(table) + "\n")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(KINDS)} steps failed: {'; '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
