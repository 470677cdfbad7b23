"""What `couple.cache` costs and saves: ladder coupling with the large model's activations kept in memory, on disk, not.

One run is prepared once; then `plugbridge couple` does the same steps with each cache, in a process of its own, taking
turns. Seconds and peak memory (over the process without a model) are of coupling alone, medians over the rounds. The
losses of all three are compared: a cache changes how often the large model reads a row, and nothing else.

    python benchmarks/ladder_cache.py --table docs/results/ladder_cache.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from plugbridge.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("off", "memory", "disk")


def plugbridge(*words: str) -> None:
    """One command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, "-W", "ignore", "-m", "plugbridge", *words], check=True, env=environment)


def couplings(config: Path, root: Path, settings: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What coupling with each cache said of itself, round by round."""
    common = [str(config), "--out", str(root), "--quiet"]
    for stage in ("tune", "score", "prune"):
        plugbridge(stage, *common, *(word for text in settings for word in ("--set", text)))
    found: dict[str, list[dict[str, Any]]] = {cache: [] for cache in CACHES}
    for _ in range(rounds):
        for cache in CACHES:
            sets = [*settings, f"couple.cache={cache}"]
            plugbridge("couple", *common, *(word for text in sets for word in ("--set", text)))
            marker = json.loads((root / "couple" / "done.json").read_text(encoding="utf-8"))
            losses = json.loads((root / "couple" / "losses.json").read_text(encoding="utf-8"))
            row = {"seconds": marker["seconds"], "peak_bytes": marker["peak_bytes"], "losses": losses}
            row |= {key: marker["facts"][key] for key in ("large_rows", "cache_bytes")}
            found[cache].append(row)
            print(cache, {key: value for key, value in row.items() if key != "losses"}, flush=True)
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "gpt2-lora.yaml")
    parser.add_argument("--mode", choices=("ladder", "ladder_delta"), default="ladder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    settings = [f"couple.mode={args.mode}", f"couple.steps={args.steps}", "tune.steps=10", "ceiling=null"]
    with tempfile.TemporaryDirectory() as folder:
        found = couplings(args.config, Path(folder) / "run", settings, args.rounds)
    plain = found["off"][0]["losses"]
    others = [row["losses"] for rows in found.values() for row in rows]
    furthest = max(abs(a - b) for losses in others for a, b in zip(losses, plain, strict=True))
    rows = {
        cache: {key: median(one[key] for one in ones) for key in ("seconds", "peak_bytes", "large_rows", "cache_bytes")}
        for cache, ones in found.items()
    }
    head = "| cache | rows that the large model read | MiB kept | peak MiB | seconds | seconds / off |"
    lines = [head, "|---" * 6 + "|"]
    for cache, row in rows.items():
        kept, peak = (row[key] / 2**20 for key in ("cache_bytes", "peak_bytes"))
        ratio = row["seconds"] / rows["off"]["seconds"]
        lines.append(
            f"| {cache} | {row['large_rows']:,.0f} | {kept:,.0f} | {peak:,.0f} | {row['seconds']:.0f} | {ratio:.2f} |"
        )
    print("\n".join(lines))
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        how = f"{args.config.stem}, {args.mode}, {args.steps} steps; losses differ by {furthest:.1e} at most."
        command = f"    python benchmarks/ladder_cache.py {' '.join(sys.argv[1:])}"
        write_text(args.table, "\n".join(["# The cost of a cache", "", about, "", how, "", command, "", *lines, ""]))
        write_json(args.table.with_suffix(".json"), rows)


if __name__ == "__main__":
    main()
