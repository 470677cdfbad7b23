"""`plugbridge plan`: what a run would take."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from plugbridge.cli.options import MOST, ConfigArg, JsonOption, SetOption
from plugbridge.cli.terminal import log_here, out, progress, say, say_command, setup
from plugbridge.config import load_config
from plugbridge.embedded import config_file
from plugbridge.imports import leave_out_bitsandbytes

if TYPE_CHECKING:
    from plugbridge.plan.make import Plan

LONGEST = 10_000_000
"""Tokens of a row at most, as of `max_length`."""


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
            max=LONGEST,
            show_default=False,
            help="tokens of a row; by default 512, or what max_length and the models' positions leave of them",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            max=MOST,
            show_default=False,
            help="CPU threads whose rates are measured; by default a run's own",
        ),
    ] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, time, disk and forward passes of every stage from the models' config files; loads nothing."""
    from plugbridge.memory.sizes import parse_bytes

    config = config_file(config)
    log_here(as_json)
    loaded = load_config(config, tuple(sets or ()))
    room = parse_bytes(memory) if memory is not None else None
    from plugbridge.devices import check_device
    from plugbridge.plan.beside import second_process
    from plugbridge.preflight import check_config, check_length, check_models, check_task

    checked = check_config(loaded)
    check_task(checked, check_models(checked, weights=False))
    if length is not None:
        check_length(checked, length)
    if room is None:
        check_device(checked.device)  # of which the free memory is asked
    fresh = leave_out_bitsandbytes()  # a plan has stand-ins for what it quantises
    say(f"plan {config}", as_json)
    setup(True)
    from plugbridge.plan.make import make_plan  # all that is heavy, before the process is copied

    with second_process(copied=fresh) as beside:
        found = make_plan(loaded, length, room, threads, beside, progress(as_json))
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return
    _print_plan(found, config, sets or [])


def _print_plan(found: "Plan", config: Path, sets: list[str]) -> None:
    out.print(_table(found))
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    where = "card" if found.device == "cuda" else f"processor with {threads}"
    rates = (
        f"{name} {rate.flops / 1e9:,.0f} GFLOP/s in matrix products and {rate.moved / 1e9:,.1f} GB/s in all else"
        for name, rate in found.rates.items()
    )
    out.print(f"time: at the rates of this machine's {where}: {'; '.join(rates)}")
    whole = found.whole
    if whole.read_bytes:
        out.print(
            f"reading {whole.read_bytes / 2**30:,.1f} GiB of the streamed model from disk is not in it: "
            f"{_lasting(whole.read_bytes / 1e9)} at 1 GB/s; every batch reads it anew, and every part of one "
            "(couple.micro_batch), but in mode backprop and a ceiling"
        )
    if found.baseline:
        taken = f"{found.baseline / 2**30:.1f} GiB here"
        out.print(f"peaks are over what Python and its libraries take, {taken}, which --memory has to hold, too")
    else:
        out.print("peaks are the card's")
    for size, commit in found.commits.items():
        out.print(f"the {size} model is of commit {commit}, where its branch on the hub is now")
    out.print(f"rows are taken to be full, {found.length} tokens: give --length if yours are shorter")
    if any(stage.name.endswith("(a batch)") for stage in found.stages):
        out.print(
            "(a batch): of evaluate.batch_size rows; how many there are is in no configuration file, the sum has one"
        )
    for note, names in _notes(found).items():
        out.print(f"{', '.join(names)}: {note}")
    free = shutil.disk_usage(Path.cwd()).free
    if whole.disk_bytes > free:
        out.print(f"the run may write {whole.disk_bytes / 2**20:,.0f} MiB; here are {free / 2**20:,.0f} MiB free")
    if found.memory is not None:
        _print_what_fits(found, found.memory, f"plugbridge run {shlex.quote(str(config))}", sets)
        _print_faithful(found)


def _print_what_fits(found: "Plan", memory: int, command: str, sets: list[str]) -> None:
    given = f"{memory / 2**30:.1f} GiB"
    if memory <= found.baseline:
        out.print(f"{given} is less than Python and its libraries take by themselves")
        return
    if found.peak.fits is False:
        out.print(f"'{found.peak.name}' does not fit in {given}")
    if found.advice is not None and found.advice.stuck is not None:
        out.print(f"no setting tried makes '{found.advice.stuck}' fit")
        return
    out_of_it = [setting.partition("=")[0] for setting in found.left_out if not setting.startswith("evaluate.")]
    if out_of_it:
        out.print(f"not needed for the transfer and does not fit: {', '.join(out_of_it)}")
    settings = [*(found.advice.settings if found.advice is not None else ()), *found.left_out]
    if found.peak.fits and "resident=none" in settings:
        out.print("resident: auto would go by the memory that is free when the run begins")
    if settings:
        out.print("the run fits with")
        say_command([command, *(f"--set {shlex.quote(setting)}" for setting in (*sets, *settings))])
    if found.faster is not None:
        quick = " ".join(f"--set {setting}" for setting in found.faster.settings)
        out.print(
            f"there is room to couple in {found.faster.share:.2f} of the time: add {quick} "
            f"({found.faster.peak_bytes / 2**20:,.0f} MiB)"
        )


def _print_faithful(found: "Plan") -> None:
    way = found.faithful
    if way is None:
        return
    reads = f", {way.read_bytes / 2**30:,.1f} GiB read" if way.read_bytes else ""
    settings = " ".join(f"--set {shlex.quote(each)}" for each in way.settings)
    out.print(
        f"the most faithful way that fits: {way.way} ({settings}), "
        f"{way.peak_bytes / 2**20:,.0f} MiB and {way.seconds:,.2g} s a step{reads}; {way.said}"
    )


def _table(found: "Plan") -> Table:
    reads = any(stage.read_bytes for stage in found.stages)
    table = Table(title=f"large model: {found.large_parameters:,} parameters; rows of {found.length} tokens")
    table.add_column("stage")  # whose lines break on a narrow terminal; numbers never do
    columns = ("peak\nMiB", "\ntime", "disk\nMiB", *(("read\nGiB",) if reads else ()))
    for column in (*columns, "forward\npasses", "large\nrows", "\nfits"):
        table.add_column(column, justify="right", no_wrap=True)
    ours = sum(stage.ours for stage in found.stages)
    stages = [*found.stages[:ours], found.whole, *found.stages[ours:]]
    for index, stage in enumerate(stages):
        last = index in (ours - 1, ours) or stages[min(index + 1, len(stages) - 1)].reference != stage.reference
        read = (f"{stage.read_bytes / 2**30:,.1f}",) if reads else ()
        table.add_row(
            stage.name, f"{stage.peak_bytes / 2**20:,.0f}", _lasting(stage.seconds),
            f"{stage.disk_bytes / 2**20:,.0f}", *read, f"{stage.passes:,}", f"{stage.large_rows:,}",
            {None: "", True: "yes", False: "no"}[stage.fits], end_section=last,
        )  # fmt: skip
    return table


def _lasting(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 3600:,.1f} h"


def _notes(found: "Plan") -> dict[str, list[str]]:
    """The stages that each note is about."""
    notes: dict[str, list[str]] = {}
    for stage in found.stages:
        if stage.note:
            notes.setdefault(stage.note, []).append(f"'{stage.name}'")
    return notes
