"""Choose each method's default learning rate on validation rows of the embedded task.

For every family and method (or baseline: `finetuned`, `ladder`) the small and the large model are tuned at each
rate; the accuracy is of the validation split, the test rows are never read. Every cell is a stage of a run
directory: an interrupted sweep goes on where it was.

    python benchmarks/learning_rates.py --out runs/learning_rates --table docs/results/learning_rates.md
    python benchmarks/learning_rates.py --methods finetuned --rates 1e-4 3e-4 1e-3 3e-3 --out runs/learning_rates
"""

import argparse
import sys
from pathlib import Path

from plugbridge.config import RunConfig, load_config
from plugbridge.files import write_text
from plugbridge.models import quiet_transformers
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import execute, facts_of
from plugbridge.stages.build import build_stages

ROOT = Path(__file__).resolve().parent.parent
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STAGES = {"small": "tune", "large": "ceiling"}
BASELINES = ("finetuned", "ladder")


def place(method: str, model: str) -> tuple[str, str, str]:
    """Of a method on a model: the configuration file's method, the stage, and the section of its settings."""
    if method in BASELINES:
        return "lora", f"{model}_{method}", f"baselines.{model}_{method}"
    return method, STAGES[model], STAGES[model]


def cell(config: RunConfig, root: Path, stage: str) -> float:
    """Validation accuracy of one tuned model; does the work only if it is not done."""
    execute(root, build_stages(prepare(config, None), root, Silent()), stage, lambda _stage, _what: None)
    return float(facts_of(root, stage)["validation"]["accuracy"])


def sweep(families: list[str], methods: list[str], rates: list[float], steps: int, out: Path) -> list[str]:
    """Rows of the table, one per family, method and model."""
    lines: list[str] = []
    for family in families:
        for method in methods:
            for model in STAGES:
                values: list[float] = []
                name, stage, section = place(method, model)
                for rate in rates:
                    overrides = (f"{section}.learning_rate={rate}", f"{section}.steps={steps}")
                    config = load_config(ROOT / "configs" / f"{family}-{name}.yaml", overrides)
                    values.append(cell(config, out / f"{family}-{method}-{model}-{rate:g}", stage))
                    print(family, method, model, f"{rate:g}", f"{values[-1]:.3f}", flush=True)
                best = max(values)
                cells = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]
                lines.append(f"| {family} | {method} | {model} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run the sweep and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "t5"])
    parser.add_argument("--methods", nargs="+", default=["lora", "adapter", "prefix"])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    quiet_transformers()
    lines = sweep(args.families, args.methods, args.rates, args.steps, args.out)
    head = "| family | method | model | " + " | ".join(f"{rate:g}" for rate in args.rates) + " |"
    rule = "|---" * (3 + len(args.rates)) + "|"
    text = (
        "# Learning rates\n\nAccuracy on the validation rows of `wordnet-kind` "
        f"({args.steps} steps of 32 rows, one seed) by peak learning rate. "
        f"Made by\n\n    python benchmarks/learning_rates.py {' '.join(sys.argv[1:])}\n\n"
        + "\n".join([head, rule, *lines])
        + "\n"
    )
    if args.table:
        write_text(args.table, text)
    print(text)


if __name__ == "__main__":
    main()
