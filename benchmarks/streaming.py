"""What a large model takes in memory, and how long it works, as a whole and streamed, on the same disk.

Each piece of work runs in a process of its own: peak resident memory over what the process had before it loaded the
model, and seconds. The model is GPT-2-shaped with random weights; its file is read before, so that both find it in
the system's page cache, which is not counted.

    python benchmarks/streaming.py --table docs/results/streaming.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from plugbridge.cost import measure
from plugbridge.evaluate import log_likelihood
from plugbridge.families.spec import Layout
from plugbridge.files import write_json, write_text
from plugbridge.models import find_checkpoint, layout_for, load_model
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import fisher, magnitude
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.shrink.stream_fisher import streamed_fisher
from plugbridge.streaming import load_streamed, window_of
from plugbridge.tasks.encode import Batch

KINDS = ("forward", "fisher", "prune")


def save_model(args: argparse.Namespace, folder: Path) -> int:
    """A GPT-2 with random weights on disk. Returns its bytes."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=args.length, n_embd=args.hidden, n_layer=args.layers, n_head=args.hidden // 64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.numel() * p.itemsize for p in model.parameters())


def batch_of(args: argparse.Namespace, rows: int, seed: int = 0) -> Batch:
    """Full-length rows; the last four tokens are predicted."""
    ids = torch.randint(5, 2000, (rows, args.length), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones_like(ids), ids[:, -4:])


def load(folder: str, streams: bool) -> tuple[PreTrainedModel, Layout]:
    """The model, whole or streamed."""
    if not streams:
        model = load_model(folder)
        for parameter in model.parameters():  # mapped pages come and go: what counts is a model in memory
            parameter.data = parameter.data.clone()
        return model, layout_for(model)
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    return load_streamed(folder, checkpoint)


def work(kind: str, args: argparse.Namespace, model: PreTrainedModel, layout: Layout) -> None:
    """One piece of work with a loaded model."""
    if kind == "forward":
        with torch.no_grad():
            for seed in range(2):
                log_likelihood(model, batch_of(args, args.rows, seed), "causal")
    elif kind == "prune":
        prune_model(model, layout, plan_bridge(layout, magnitude(model, layout), reduced_sizes(layout, 4)), {})
    else:
        samples = [batch_of(args, 1, seed) for seed in range(args.rows)]
        score = partial(streamed_fisher, chunk=args.rows) if window_of(model) is not None else fisher
        score(model, layout, samples, lambda batch: log_likelihood(model, batch, "causal").sum())


def measured(kind: str, streams: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and do one piece of work here."""
    torch.set_num_threads(args.threads)
    with measure("cpu") as cost:
        model, layout = load(args.folder, streams)
        start = time.perf_counter()
        work(kind, args, model, layout)
        seconds = time.perf_counter() - start
    return {"peak_bytes": cost.peak_bytes, "seconds": seconds}


def in_a_process(kind: str, way: str, folder: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--kind", kind, "--way", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(found: dict[str, dict[str, dict[str, Any]]], size: int) -> str:
    """A Markdown table of the ratios."""
    lines = [
        "| work | memory, whole | memory, streamed | streamed / whole | seconds, streamed / whole |",
        "|---|---|---|---|---|",
    ]
    for kind, ways in found.items():
        a, b = ways["whole"], ways["streamed"]
        lines.append(
            f"| {kind} | {a['peak_bytes'] / size:.2f} | {b['peak_bytes'] / size:.2f} | "
            f"{b['peak_bytes'] / a['peak_bytes']:.2f} | {b['seconds'] / a['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every piece of work both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 1024), ("layers", 24), ("length", 128), ("rows", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--folder")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(measured(args.kind, args.way == "streamed", args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        size = save_model(args, Path(temporary))
        found = {k: {way: in_a_process(k, way, Path(temporary)) for way in ("whole", "streamed")} for k in KINDS}
    text = table(found, size)
    print(text)
    if args.table is not None:
        intro = (
            f"# Streaming\n\nPeak memory as a share of the model's {size / 1e9:.2f} GB of weights, and seconds, of one "
            "large model streamed from disk and as a whole; one run, each piece of work in a process of its own. The "
            f"model is GPT-2-shaped ({args.layers} layers, {args.hidden} wide), {args.rows} rows of {args.length} "
            f"tokens, {args.threads} thread. Seconds are of a machine that did other work beside.\n\n"
            f"    python benchmarks/streaming.py --table {args.table}\n\n"
        )
        write_text(args.table, intro + text)
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
