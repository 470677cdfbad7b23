"""Run shipped configurations and put their results side by side.

    python benchmarks/main_job.py --out runs/main_job
    python benchmarks/main_job.py --tasks rte cb copa --data DIR --out runs/superglue --table docs/results/superglue.md

Every run is resumable; a finished one is only read. One seed each: these tables show the job, the quality
bench with its seeds and controls is another command.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from plugbridge.config import load_config
from plugbridge.files import write_json, write_text
from plugbridge.models import quiet_transformers
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.report import read_report, wilson
from plugbridge.run import execute, locked
from plugbridge.stages.build import build_stages

ROOT = Path(__file__).resolve().parent.parent
MODES = {"standalone": (), "feedback": ()}  # what else a mode needs is its default
ROWS = ("small_tuned", "large_zero_shot", "bridge_coupled", "large_plugged", "large_tuned")
COLUMNS = (
    "task", "family", "method", "coupling", "majority", "small tuned", "large zero-shot", "Bridge (thrown away)",
    "**large plugged**", "large tuned", "PGR", "n",
)  # fmt: skip


def run(name: str, task: str | None, overrides: list[str], data: Path | None, root: Path) -> dict[str, Any]:
    """One configuration's report; does the work only where it is not done."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", (*([f"task={task}"] if task else []), *overrides))
    with locked(root):
        write_text(root / "config.yaml", config.model_dump_json(indent=2))  # JSON is YAML
        execute(root, build_stages(prepare(config, data), root, Silent()), None, lambda _stage, _what: None)
    return read_report(root)


def line(report: dict[str, Any], family: str) -> str:
    """One row of the table, Wilson 95 % intervals of the rows in small print."""
    rows = {row["name"]: row for row in report["rows"]}
    cells: list[str] = []
    for name in ROWS:
        if name not in rows:
            cells.append("")
            continue
        value, n = rows[name]["value"], rows[name]["n"]
        low, high = wilson(value, n)
        cells.append(f"{value:.3f} <sub>{low:.2f} to {high:.2f}</sub>")
    pgr = "" if report["pgr"] is None else f"{report['pgr']:+.2f}"
    majority = report["majority"][report["rows"][0]["metric"]]
    first = f"| {report['task']} | {family} | {report['method']} | {report['mode']} | {majority:.3f} | "
    return first + " | ".join(cells) + f" | {pgr} | {report['rows'][0]['n']} |"


def _portable(report: dict[str, Any]) -> dict[str, Any]:
    """The report without this machine's paths."""
    models: dict[str, dict[str, Any]] = report["models"]
    named = {
        role: {k: str(Path(v).relative_to(ROOT)) if k == "source" else v for k, v in facts.items()}
        for role, facts in models.items()
    }
    return {**{k: v for k, v in report.items() if k != "checkpoint"}, "models": named}


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "t5"])
    parser.add_argument("--methods", nargs="+", default=["lora", "adapter", "prefix"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--tasks", nargs="+", default=["wordnet-kind"])
    parser.add_argument("--set", dest="sets", nargs="+", default=[], help="overrides, such as couple.steps=100")
    parser.add_argument("--data", type=Path, help="directory of task files")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    quiet_transformers()
    reports: list[dict[str, Any]] = []
    lines: list[str] = []
    for task in args.tasks:
        for family in args.families:
            for method in args.methods:
                for mode in args.modes:
                    name = f"{task}-{family}-{method}-{mode}"
                    sets = [f"couple.mode={mode}", *MODES[mode], *args.sets]
                    found = run(f"{family}-{method}", task, sets, args.data, args.out / name)
                    reports.append({"run": name, **_portable(found)})
                    lines.append(line(found, family))
                    print(lines[-1], flush=True)
                    if args.table:
                        _write(args.table, lines, reports)


def _write(table: Path, lines: list[str], reports: list[dict[str, Any]]) -> None:
    head = "| " + " | ".join(COLUMNS) + " |"
    rule = "|---" * len(COLUMNS) + "|"
    command = f"Made by\n\n    python benchmarks/main_job.py {' '.join(sys.argv[1:])}\n\n"
    text = (
        "# The main job\n\n"
        + (__doc__ or "").partition("    python")[0]
        + command
        + "\n".join([head, rule, *lines])
        + "\n"
    )
    write_text(table, text)
    write_json(table.with_suffix(".json"), reports)


if __name__ == "__main__":
    main()
