"""`plugbridge plan`: what a run would take."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from plugbridge.cli.options import ConfigArg, JsonOption, SetOption
from plugbridge.cli.terminal import out, setup
from plugbridge.config import load_config


def plan(
    config: ConfigArg,
    memory: Annotated[
        str | None, typer.Option("--memory", help="say what fits in so much, such as 8GB", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=4,
            show_default=False,
            help="tokens of a row; by default 512, or what max_length and the models' positions leave of them",
        ),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the rate that is measured")] = 1,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, time, disk and forward passes of every stage from the models' config files; loads nothing."""
    from plugbridge.memory.sizes import parse_bytes

    loaded = load_config(config, tuple(sets or ()))
    room = parse_bytes(memory) if memory is not None else None
    from plugbridge.plan.beside import import_less, second_process

    fresh = import_less()
    setup(True)
    from plugbridge.plan.make import make_plan  # all that is heavy, before the process is copied

    with second_process(copied=fresh) as beside:
        found = make_plan(loaded, length, room, threads, beside)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return
    _print_plan(found)


def _print_plan(found: Any) -> None:
    table = Table(title=f"large model: {found.large_parameters:,} parameters; rows of {found.length} tokens")
    table.add_column("stage")  # whose lines break on a narrow terminal; numbers never do
    for column in ("peak\nMiB", "\nhours", "disk\nMiB", "forward\npasses", "large\nrows", "\nfits"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds = {index: (stage.ours, stage.reference) for index, stage in enumerate(found.stages)}
    for index, stage in enumerate(found.stages):
        fits = {None: "", True: "yes", False: "no"}[stage.fits]
        table.add_row(
            stage.name, f"{stage.peak_bytes / 2**20:,.0f}", f"{stage.seconds / 3600:.2f}",
            f"{stage.disk_bytes / 2**20:,.0f}", f"{stage.passes:,}", f"{stage.large_rows:,}", fits,
            end_section=kinds.get(index + 1, kinds[index]) != kinds[index],
        )  # fmt: skip
    out.print(table)
    where = "card" if found.device == "cuda" else "processor"
    out.print(
        f"hours at the rates of this machine's {where}: {found.rates.flops / 1e9:.0f} GFLOP/s in matrix products, "
        f"{found.rates.moved / 1e9:.1f} GB/s in all else; reading a model from disk is not in them"
    )
    if found.baseline:
        taken = f"{found.baseline / 2**30:.1f} GiB here"
        out.print(f"peaks are over what Python and its libraries take, {taken}, which --memory has to hold, too")
    else:
        out.print("peaks are the card's")
    out.print("(a batch): of evaluate.batch_size rows; how many there are is in no configuration file")
    for stage in found.stages:
        if stage.note:
            out.print(f"'{stage.name}': {stage.note}")
    tight = [stage.name for stage in found.stages if stage.reference and stage.fits is False]
    if tight:
        out.print(f"not needed for the transfer and does not fit, leave it out: {', '.join(tight)}")
    if found.advice is not None:
        stuck = found.advice.stuck
        what = f"no setting tried makes '{stuck}' fit" if stuck else f"it fits with {', '.join(found.advice.settings)}"
        out.print(f"'{found.peak.name}' does not fit in {found.memory / 2**30:.1f} GiB; {what}")
