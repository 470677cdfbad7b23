"""Commands over a finished run: `plugbridge report` and `plugbridge submit`."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from plugbridge.cli.completion import models, tasks
from plugbridge.cli.options import DataOption, JsonOption, QuietOption, RunArg, path_in
from plugbridge.cli.terminal import err, log_here, out, progress, say, say_code, setup
from plugbridge.config import load_config
from plugbridge.errors import ConfigError, PlugbridgeError
from plugbridge.parsing import one_line


def report(root: RunArg, as_json: JsonOption = False) -> None:
    """Print a finished run as a table (and write report.png, losses.png and fidelity.png) or as one JSON object."""
    from plugbridge.report import read_report

    log_here(quiet=False)
    found = read_report(root)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    print_table(found)
    out.print(draw_all(found, root))


def draw_all(found: dict[str, Any], root: Path) -> str:
    """A run's pictures, and the line that says where they are."""
    from plugbridge.report import draw, draw_fidelity, draw_losses

    works: dict[str, Callable[[Path], bool | None]] = {
        "report.png": lambda path: draw(found, path),
        "losses.png": lambda path: draw_losses(root, path),
        "fidelity.png": lambda path: draw_fidelity(found, path),
    }
    made = [name for name, work in works.items() if _drawn(work, root / name)]
    if not made:
        return "no picture was drawn"
    return f"{'pictures' if len(made) > 1 else 'picture'}: {', '.join([str(root / made[0]), *made[1:]])}"


def _drawn(work: Callable[[Path], bool | None], path: Path) -> bool:
    """Whether a picture was made; what keeps it from being made is said, for the numbers do not need it."""
    try:
        return work(path) is not False
    except PlugbridgeError as error:  # such as another's picture of that name, which stays
        reason = one_line(error, 300)
    except Exception as error:  # matplotlib's own are many
        reason = f"{path} was not drawn ({type(error).__name__}: {one_line(error, 200)})"
    err.print(f"warning: {reason}")
    return False


def submit(
    root: RunArg,
    out_dir: Annotated[
        Path,
        typer.Option("--out", parser=path_in("--out"), help="directory of the leaderboard's files", show_default=False),
    ],
    data: DataOption = None,
    model: Annotated[
        str, typer.Option("--model", help="a model of the run's report", autocompletion=models)
    ] = "large_plugged",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="ax-b or ax-g for a run of rte  [default: the run's task]",
            show_default=False,
            autocompletion=tasks,
        ),
    ] = None,
    tests: Annotated[
        Path | None,
        typer.Option(
            "--tests",
            parser=path_in("--tests"),
            help="directory of the official test files, for rows from the hub  [default: --data]",
            show_default=False,
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Answer SuperGLUE's unlabelled test rows with a finished run; write the leaderboard's file."""
    from plugbridge.report import read_report

    read_report(root)  # refuses what is no finished run
    log_here(quiet)
    config = load_config(root / "config.yaml")
    from plugbridge.preflight import preflight
    from plugbridge.stages.leaderboard import read_unanswered
    from plugbridge.tasks.hub import from_hub
    from plugbridge.tasks.spec import load_task

    checked = preflight(config, data)
    folder = tests or data or (Path(config.data) if config.data else None)
    if from_hub(folder):
        raise ConfigError("the hub is for rows with labels; give --tests DIR of the official test files")
    asked = read_unanswered(checked, root, checked.task if task is None else load_task(task), model, folder, out_dir)
    say(f"submit {root} -> {asked.path}, {len(asked.rows):,} rows", quiet)
    setup(quiet)
    from plugbridge.prepare import prepare_checked
    from plugbridge.stages.submit import submit as write_answers

    done = write_answers(prepare_checked(checked), root, asked, model, progress(quiet))
    out.print(f"{done.path}: answers of {model}")
    if done.long:
        out.print(f"{len(done.long):,} of {done.rows:,} rows were not read and have {done.instead}: {done.long[0]}")


def print_table(found: dict[str, Any]) -> None:
    """A report's rows, and what was recovered."""
    from plugbridge.report import TITLES, commonest, fidelity_said, how_made

    first = found["rows"][0]
    title = "; ".join(filter(None, (f"{found['task']}, {first['n']} {found['split']} rows", how_made(found))))
    table = rows_of(found)
    if out.measure(table, options=out.options.update(width=1000)).maximum <= out.width:
        table.title, table.title_justify = title, "left"
        out.print(table)
        out.print(
            "seconds and MiB: of making the model, or of scoring it where nothing was trained; "
            "changed: parameters the checkpoint adds"
        )
    else:
        out.print(title)
        for row in found["rows"]:
            out.print(TITLES[row["name"]])
            seconds, mib = f"{row['seconds']:.0f} s", f"{row['peak_bytes'] / 2**20:.0f} MiB"
            out.print(f"  {row['metric']} {row['value']:.3f}, {seconds}, {mib}")
        out.print(
            "seconds and MiB: of making the model, or of scoring it where nothing was trained; "
            "a wider terminal shows parameters, too"
        )
    chance = found["majority"][first["metric"]]
    pgr = found["pgr"]
    recovered = f"{pgr:+.2f}" if pgr is not None else f"-, {found['pgr_reason']}"
    peak = found["peak"]
    held = {"device": "allocated on the device", "resident": "resident, over the process without a model"}
    highest = f"{peak['bytes'] / 2**20:,.0f} MiB in '{peak['stage']}' ({held[peak['memory']]})"
    if peak["reserved_bytes"]:
        highest += f"; at most {peak['reserved_bytes'] / 2**20:,.0f} MiB were reserved"
    out.print(f"peak of the whole job, references left out: {highest}")
    coupling = found["coupling"]
    if coupling is not None:
        kept = f"; {coupling['cache_bytes'] / 2**20:,.0f} MiB of its activations were kept ({coupling['cache']})"
        out.print(
            f"the large model read {coupling['large_rows']:,} rows in coupling{kept if coupling['cache_bytes'] else ''}"
        )
        if coupling["fidelity"]:
            out.print(fidelity_said(coupling["fidelity"]))
        if coupling["still"]:
            places = ", ".join(f"{stack} {layer}" for stack, layer in coupling["still"])
            out.print(f"modules that stayed as they started, their fidelity not above 0: {places}")
    for line in found["remarks"] or filter(None, [cut_line(found["cut"])]):
        out.print(line)
    out.print(f"{commonest(found)} {chance:.3f}; performance gap recovered (PGR) {recovered}")


def rows_of(found: dict[str, Any]) -> Table:
    """A report's rows as a table."""
    from plugbridge.report import TITLES

    table = Table()
    for column in ("model", found["rows"][0]["metric"], "seconds", "MiB", "trainable", "changed"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in found["rows"]:
        counts = row["parameters"]
        table.add_row(
            TITLES[row["name"]], f"{row['value']:.3f}", f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{counts['trainable']:,}", f"{counts['changed']:,}",
        )  # fmt: skip
    return table


def cut_line(cut: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str | None:
    """Which rows were cut to fit the models; None where none were."""
    found = [
        f"{counts['cut']:,} of {counts['rows']:,} {split} rows for {model}"
        + (f" ({counts['emptied']:,} to nothing)" if counts["emptied"] else "")
        for model, splits in cut.items()
        for split, counts in splits.items()
        if counts["cut"]
    ]
    return f"passages were cut to fit: {', '.join(found)}" if found else None


def print_loading(found: dict[str, Any], pictures: str) -> None:
    """Where the plugged checkpoint and the pictures are, and the lines that load it."""
    if found["checkpoint"] is None:
        out.print(f"\n{pictures}")
        return
    kind = "AutoModelForSeq2SeqLM" if "T5" in _architecture(found) else "AutoModelForCausalLM"
    ours = "  import plugbridge  # knows the adapter\n" if found["method"] == "adapter" else ""
    large = found["models"]["large"]
    revision = f", revision={large['commit']!r}" if large["commit"] else ""
    out.print(f"\nplugged checkpoint: {found['checkpoint']}\n{pictures}")
    say_code(
        f"\nload it:\n{ours}  from transformers import {kind}\n  from peft import PeftModel\n"
        f"  model = {kind}.from_pretrained({large['source']!r}{revision})\n"
        f"  model = PeftModel.from_pretrained(model, {found['checkpoint']!r})",
    )


def _architecture(found: dict[str, Any]) -> str:
    from plugbridge.models import load_config as model_config
    from plugbridge.sources import HubId

    large = found["models"]["large"]
    source = HubId(large["source"], large["commit"]) if large["commit"] else large["source"]
    return " ".join(model_config(source).architectures or ())
