"""`plugbridge sweep`: choosing settings on validation rows."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from plugbridge.cli.completion import models, settings
from plugbridge.cli.options import ConfigArg, DataOption, QuietOption, RunsOption, SetOption
from plugbridge.cli.terminal import announcer, log_here, out, progress, say, setup
from plugbridge.embedded import config_file

if TYPE_CHECKING:
    from plugbridge.bench.sweep import Tried


def sweep(
    config: ConfigArg,
    vary: Annotated[
        list[str],
        typer.Option("--vary", help="a key and its values, such as couple.learning_rate=0.001,0.003; repeatable",
                     show_default=False, autocompletion=settings),
    ],
    by: Annotated[
        str,
        typer.Option("--by", help="the model that is judged, as `report --json` names it", autocompletion=models),
    ] = "large_plugged",
    out_dir: RunsOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Run every combination of some settings and compare them on validation rows; interrupted, it goes on.

    Stages that the combinations share are done once.
    """
    log_here(quiet)
    from plugbridge.bench.pages import check_page
    from plugbridge.bench.sweep import (
        as_json,
        best_of,
        combinations,
        draw_sweep,
        foot,
        rivals,
        sweep_configs,
        sweep_page,
        tried,
        verdict,
    )

    config = config_file(config)
    configs = sweep_configs(config, sets or (), vary, by)
    root = out_dir if out_dir is not None else Path("runs") / "sweep" / config.stem
    from plugbridge.markers import check_root
    from plugbridge.preflight import check_runs

    check_runs(configs.values())
    check_page(root / "sweep.md")
    for name in configs:
        check_root(root / name, config, None)
    say(f"sweep {config} -> {root}, {len(configs)} runs", quiet)
    setup(quiet)
    from plugbridge.bench.cells import do_runs
    from plugbridge.files import write_json, write_text

    reasons = do_runs(configs, root, data, progress(quiet), announcer(quiet), config)
    found = tried(combinations(vary), root, reasons)
    best = best_of(found, by)
    page = sweep_page(found, by, "plugbridge " + " ".join(map(shlex.quote, sys.argv[1:])))
    write_text(root / "sweep.md", page)
    write_json(root / "sweep.json", as_json(found))
    draw_sweep(found, by, root / "sweep.png")
    out.print(sweep_table(found, by, best if best is not None and not rivals(found, best, by) else None))
    for run in found:
        if run.failed:
            out.print(f"failed: {' '.join(run.sets)}: {run.failed}")
    for line in (verdict(found, by), foot(found)):
        if line:
            out.print(line)
    out.print(f"{root / 'sweep.md'} has every model, sweep.json and sweep.png beside it")


def sweep_table(found: Sequence["Tried"], by: str, best: "Tried | None") -> Table:
    """What was varied and what the judged model gave, the `best` bold; long texts go on in the next line."""
    from plugbridge.report import TITLES

    metric = next((f" {run.metric}" for run in found if run.metric), "")
    table = Table()
    for text in found[0].sets:
        table.add_column(text.partition("=")[0], overflow="fold")
    table.add_column(f"{TITLES[by]}{metric}", overflow="fold", justify="right")
    for run in found:
        value = f"{run.values[by]:.3f}" if by in run.values else "failed"
        table.add_row(*(text.partition("=")[2] for text in run.sets), value, style="bold" if run is best else None)
    return table
