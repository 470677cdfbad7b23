"""Whether a run takes what its plan said: every stage's peak memory and seconds, planned and measured, at three sizes.

GPT-2-shaped pairs with random weights and the embedded pair's tokenizer, a task of made-up rows that fill their length,
three steps of each training. `plugbridge plan --json` is asked first, then `plugbridge run` works as any user's does,
each stage in a process of its own; with the large model in memory, streamed from disk, in memory in bfloat16 (the files
are float32), and where it only runs forward in 8 bits. What a stage takes is the most of its lines in the plan
(training and validation, say), its seconds are their sum; loading, writing and reading from disk and the small models'
scoring are not planned. Models of a pair share their width's ratio: the small one is a quarter as wide and has a
quarter of the layers.

    python benchmarks/plan_and_run.py --table docs/results/plan_and_run.md
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import quantiles
from typing import Any

from transformers import AutoTokenizer, GPT2LMHeadModel

from plugbridge.files import write_json, write_text
from plugbridge.memory.shapes import gpt2

PAIR = Path(__file__).parents[1] / "pairs" / "gpt2" / "large"
SIZES = {"25 million": (512, 8), "57 million": (768, 8), "85 million": (768, 12)}
STAGES = ("tune", "score", "prune", "couple", "plug", "evaluate")
LENGTH = 120
WAYS: dict[str, dict[str, Any]] = {
    "in memory": {"resident": "all"},
    "streamed": {"resident": "none"},
    "in memory, bf16": {"resident": "all", "dtype": "bfloat16"},
    "in memory, 8 bit": {"resident": "all", "load_in": "8bit"},
}
"""How a run holds the large model."""


def make_pair(folder: Path, width: int, layers: int) -> None:
    """Two models with random weights, small and large, and rows of a task."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(PAIR))
    for name, share in (("small", 4), ("large", 1)):
        shape = gpt2(width // share, layers // share, width // share // 64, len(tokenizer), 128)
        GPT2LMHeadModel(shape).save_pretrained(folder / name, max_shard_size="50MB")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PAIR / file, folder / name / file)
    chosen = random.Random(0)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.islower() and len(word) > 2)
    for split, count in (("train", 32), ("validation", 8), ("test", 8)):
        rows = [{"text": " ".join(chosen.choices(words, k=LENGTH)), "label": chosen.choice("ab")} for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, resident: str, dtype: str = "float32", load_in: str | None = None) -> dict[str, Any]:
    """A run on a pair."""
    train = {"steps": 3, "batch_size": 8}
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "small": str(folder / "small"), "large": {"path": str(folder / "large"), "load_in": load_in}, "device": "cpu",
        "resident": resident, "dtype": dtype,
        "task": {**files, "prompt": "{text} :", "passage": "text", "words": {"a": " a", "b": " b"}},
        "tune": train, "couple": train, "score": {"samples": 4}, "evaluate": {"batch_size": 8, "limit": 8},
    }  # fmt: skip


def call(*words: str) -> str:
    """What a command of ours prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "plugbridge", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def compare(folder: Path, how: str) -> list[dict[str, Any]]:
    """Bytes and seconds, planned and measured, by stage."""
    path, root = folder / f"{how}.yaml", folder / f"run {how}"
    path.write_text(json.dumps(config_of(folder, **WAYS[how])))
    plan = json.loads(call("plan", str(path), "--json"))
    call("run", str(path), "--out", str(root), "--quiet")
    found: list[dict[str, Any]] = []
    for stage in STAGES:
        lines = [line for line in plan["stages"] if line["ours"] and line["name"].startswith(stage)]
        marker = json.loads((root / stage / "done.json").read_text())
        found.append(
            {
                "how": how,
                "stage": stage,
                "planned_bytes": max(line["peak_bytes"] for line in lines),
                "peak_bytes": marker["peak_bytes"],
                "planned_seconds": sum(line["seconds"] for line in lines),
                "seconds": marker["seconds"],
            }
        )
    return found


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["size"], row["how"], row["stage"]]
    cells += [f"{row[key] / 2**20:,.0f}" for key in ("planned_bytes", "peak_bytes")]
    cells.append(f"{row['planned_bytes'] / max(1, row['peak_bytes']) - 1:+.0%}")
    cells += [f"{row[key]:.1f}" for key in ("planned_seconds", "seconds")]
    return f"| {' | '.join(cells)} |"


def said_of(rows: list[dict[str, Any]]) -> str:
    """How many peaks are near, and the ratios of the seconds."""
    good = sum(abs(row["planned_bytes"] / max(1, row["peak_bytes"]) - 1) <= 0.15 for row in rows)
    longest = [row["seconds"] / row["planned_seconds"] for row in rows if row["stage"] in ("score", "couple")]
    low, middle, high = quantiles(longest, n=4)
    return (
        f"{good} of {len(rows)} peaks are within 15 %. Scoring and coupling took {middle:.1f} "
        f"times the seconds that were planned (median; quartiles {low:.1f} and {high:.1f})."
    )


def main() -> None:
    """Plan and run every pair in every way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    lines = ["| large model | | stage | planned MiB | measured MiB | off | planned s | measured s |", "|---" * 8 + "|"]
    for size, (width, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_pair(Path(folder), width, layers)
            for how in WAYS:
                for row in compare(Path(folder), how):
                    rows.append({"size": size, **row})
                    lines.append(line_of(rows[-1]))
                    print(lines[-1], flush=True)
    said = said_of(rows)
    print(said)
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        command = f"    python benchmarks/plan_and_run.py {' '.join(sys.argv[1:])}"
        write_text(args.table, "\n".join(["# Plan and run", "", about, "", command, "", said, "", *lines, ""]))
        write_json(args.table.with_suffix(".json"), rows)


if __name__ == "__main__":
    main()
