"""How long `plugbridge plan` takes for a pair of the shape of Llama 70B and 8B, from configuration files alone.

Seconds of the whole command, and of processor time, which a busy machine does not change much.

    python benchmarks/plan_speed.py --table docs/results/plan_speed.md
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    """Time the command and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pair(folder)
        command = [sys.executable, "-m", "plugbridge", "plan", str(folder / "run.yaml"), "--memory", args.memory]
        wide = {**os.environ, "COLUMNS": "140"}
        begun = time.perf_counter()
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=wide).stdout
        seconds = time.perf_counter() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime}
    print(printed, found)
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        head = f"# Planning a 70B model\n\n{about}\n\n    python benchmarks/plan_speed.py --table {args.table}\n\n"
        line = f"{found['seconds']:.1f} seconds, {found['processor_seconds']:.1f} of processor time.\n\n"
        write_text(args.table, f"{head}{line}```\n{printed.strip()}\n```\n")
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
