"""How long `plugbridge plan` takes for a pair of the shape of Llama 70B and 8B, from configuration files alone.

Seconds of the whole command, and of processor time, each the median of some rounds.

    python benchmarks/plan_speed.py --rounds 5 --table docs/results/plan_speed.md
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from transformers import LlamaConfig

from plugbridge.files import write_json, write_text

SHAPES = {"small": (4096, 14336, 32, 32), "large": (8192, 28672, 80, 64)}
"""Width, MLP width, layers and heads."""
RUN = "small: small\nlarge: large\ntask: wordnet-kind\ndtype: bfloat16\ncouple: {batch_size: 8}\n"


def write_pair(folder: Path) -> None:
    """Two model directories without weights, and a run's configuration."""
    for name, (hidden, ffn, layers, heads) in SHAPES.items():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config.save_pretrained(folder / name)
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")


def timed(command: list[str], folder: Path) -> tuple[str, float, float]:
    """What a command prints in a folder, its seconds, and those of processor time."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    wide = {**os.environ, "COLUMNS": "140"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=wide, cwd=folder).stdout
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Time the command and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pair(folder)
        command = [sys.executable, "-m", "plugbridge", "plan", "run.yaml", "--memory", args.memory]
        rounds = [timed(command, folder) for _ in range(args.rounds)]
    printed = rounds[-1][0]
    found = {"seconds": [one[1] for one in rounds], "processor_seconds": [one[2] for one in rounds]}
    print(printed, found)
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        words = f"    python benchmarks/plan_speed.py --rounds {args.rounds} --table {args.table}"
        head = f"# Planning a 70B model\n\n{about}\n\n{words}\n\n"
        times, own = found["seconds"], found["processor_seconds"]
        between = f"{min(times):.1f} to {max(times):.1f}"
        line = f"{median(times):.1f} seconds ({between}), {median(own):.1f} of processor time."
        write_text(args.table, f"{head}{line}\n\n```\n{printed.strip()}\n```\n")
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
