"""Whether the peak of scoring and pruning a large model on disk grows with its depth.

GPT-2-shaped models of two depths with random weights, read from disk block by block; the rows' states are on disk, too
(`score.keep: disk`). Each piece of work runs in a process of its own: peak resident memory over what Python and its
libraries take, beside the bytes that were predicted.

    python benchmarks/depth.py --table docs/results/depth.md
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from plugbridge.files import write_json, write_text
from plugbridge.memory.case import Case
from plugbridge.memory.measure import measured
from plugbridge.memory.predict import predict
from plugbridge.memory.shapes import gpt2
from plugbridge.memory.steps import STEPS
from plugbridge.memory.weights import write_weights


def cases_of(case: Case) -> dict[str, tuple[str, Case]]:
    """Pieces of work: a step's name and its case."""
    return {
        "score (fisher)": ("score", case),
        "score (activation)": ("score", replace(case, importance="activation")),
        "prune": ("prune", replace(case, channels="gradient_pca")),
    }


def main() -> None:
    """Measure every piece of work at both depths and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 768), ("layers", 24), ("vocabulary", 8192), ("length", 128), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    depths = (args.layers, 2 * args.layers)
    found: dict[str, list[dict[str, float]]] = {}
    for layers in depths:
        shape = gpt2(args.hidden, layers, args.hidden // 64, args.vocabulary, args.length)
        with tempfile.TemporaryDirectory() as folder:
            weights = write_weights(Case(shape, 1, args.length), Path(folder) / "model")
            case = Case(shape, 1, args.length, streamed=True, weights=str(weights), at_once=0)
            for name, (step, chosen) in cases_of(case).items():
                real = measured(chosen, STEPS[step], args.threads)
                counted = predict(replace(chosen, weights=None), STEPS[step]).peak
                row = {"layers": layers, "peak_bytes": real.peak_bytes, "predicted_bytes": counted}
                found.setdefault(name, []).append(row)
                print(name, row, flush=True)
    head = ("MiB at", "MiB at", "ratio", "predicted ratio")
    lines = [
        f"| work | {head[0]} {depths[0]} layers | {head[1]} {depths[1]} layers | {head[2]} | {head[3]} |",
        "|---|---|---|---|---|",
    ]
    for name, (a, b) in found.items():
        ratios = [b[key] / a[key] for key in ("peak_bytes", "predicted_bytes")]
        sizes = [row["peak_bytes"] / 2**20 for row in (a, b)]
        lines.append(f"| {name} | {sizes[0]:,.0f} | {sizes[1]:,.0f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")
    print("\n".join(lines))
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        size = f"{args.hidden} wide, a vocabulary of {args.vocabulary:,}, two rows of {args.length} tokens, float32, "
        size += f"{args.threads} thread(s)."
        command = f"    python benchmarks/depth.py {' '.join(sys.argv[1:])}"
        write_text(args.table, "\n".join(["# Depth", "", about, "", size, "", command, "", *lines, ""]))
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
