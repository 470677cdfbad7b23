"""The command line: one command, one short function. The only file that prints."""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from plugbridge import __version__
from plugbridge.config import RunConfig, fields_help, fields_markdown, load_config
from plugbridge.errors import ConfigError, PlugbridgeError
from plugbridge.progress import Advance, Progress, Silent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model you can run but not train: tune a small sibling, prune the large "
    "model into a Bridge, couple them, and plug the result into the large model.",
    epilog="Start with: plugbridge run config.yaml.  Every key of the file: plugbridge explain",
)
# plain: what users name (paths, labels) may hold rich's own markup or emoji codes
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)

ConfigArg = Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)]
RunArg = Annotated[Path, typer.Argument(help="a finished run's directory", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="run directory  [default: runs/<config's name>]", show_default=False)
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="PLUGBRIDGE_DATA", help="directory of task files, or `hub`", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key, such as couple.steps=500; repeatable", show_default=False),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars, results only")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


class Bars:
    """Progress drawn with rich on standard error."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("  {task.description:<34}"), BarColumn(24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=err, transient=True) as shown:
            task = shown.add_task(title, total=total, completed=done)
            yield lambda count: shown.advance(task, count)


def _progress(quiet: bool) -> Progress:
    return Silent() if quiet or not err.is_terminal else Bars()


def _setup(quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "urllib3", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not sys.warnoptions:  # what libraries say to each other's developers; `python -W` shows it
        warnings.simplefilter("ignore", FutureWarning)
    from plugbridge.models import quiet_transformers

    quiet_transformers()


def _execute(
    config_path: Path, root: Path | None, data: Path | None, sets: list[str] | None, quiet: bool, only: str | None
) -> Path:
    config = load_config(config_path, tuple(sets or ()))
    root = root if root is not None else Path("runs") / config_path.stem
    from plugbridge.run import check_needs, check_root, execute, locked

    check_root(root)
    _setup(quiet)
    from plugbridge.prepare import prepare
    from plugbridge.stages.build import build_stages

    stages = build_stages(prepare(config, data), root, _progress(quiet))
    check_needs(root, stages, only)
    try:
        with locked(root):
            if not quiet:
                err.print(Text.assemble((f"plugbridge {__version__}", "bold"), f" {config_path} -> {root}"))
            _describe(root, config)
            execute(root, stages, only, _announcer(quiet))
    except KeyboardInterrupt:
        err.print("\ninterrupted; run the same command again to resume")
        raise typer.Exit(130) from None
    return root


def _describe(root: Path, config: RunConfig) -> None:
    import platform

    import yaml

    from plugbridge.files import write_json, write_text
    from plugbridge.report import versions

    write_text(root / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
    write_json(root / "environment.json", environment)


def _announcer(quiet: bool) -> Callable[[str, str], None]:
    def announce(stage: str, what: str) -> None:
        if not quiet:
            text = f"  {stage:<9} done before, skipped" if what == "skipped" else f"  {stage}"
            err.print(text)

    return announce


@app.command()
def run(
    config: ConfigArg,
    out_dir: OutOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Do the whole job: tune, score, prune, couple, plug, evaluate. Finished stages are skipped."""
    root = _execute(config, out_dir, data, sets, quiet, None)
    _finish(root)


def _finish(root: Path) -> None:
    from plugbridge.report import draw, read_report

    found = read_report(root)
    draw(found, root / "report.png")
    _print_table(found)
    _print_loading(root, found)


def _stage_command(name: str, help_text: str) -> None:
    def command(
        config: ConfigArg,
        out_dir: OutOption = None,
        data: DataOption = None,
        sets: SetOption = None,
        quiet: QuietOption = False,
    ) -> None:
        root = _execute(config, out_dir, data, sets, quiet, name)
        out.print(f"{name}: done, in {root / name}")

    command.__doc__ = help_text
    app.command(name=name)(command)


for _name, _help in {
    "tune": "Tune the small model on the task.",
    "score": "Rank the large model's heads, channels and MLP units.",
    "prune": "Prune the large model into the Bridge, a model directory of its own.",
    "repair": "Fit the Bridge to the large model's forward passes; only with a `repair:` section.",
    "couple": "Train module, plug and Bridge together.",
    "polish": "Tune a factor for every place of the plugged module, forward only; needs a `polish:` section.",
    "plug": "Fold module and plug into a peft checkpoint of the large model.",
    "ceiling": "Tune the large model itself, with gradients: the reference, not the method.",
    "evaluate": "Score every model of the run.",
}.items():
    _stage_command(_name, _help)


@app.command()
def plan(
    config: ConfigArg,
    memory: Annotated[
        str | None, typer.Option("--memory", help="say what fits in so much, such as 8GB", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option("--length", min=4, help="tokens of a row")] = 512,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the rate that is measured")] = 1,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, time, disk and forward passes of every stage from the models' config files; loads nothing."""
    from plugbridge.memory.sizes import parse_bytes

    loaded = load_config(config, tuple(sets or ()))
    room = parse_bytes(memory) if memory is not None else None
    _setup(True)
    from plugbridge.plan import make_plan

    found = make_plan(loaded, length, room, threads)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return
    _print_plan(found)


def _print_plan(found: Any) -> None:
    table = Table(title=f"large model: {found.large_parameters:,} parameters; rows of {found.length} tokens")
    for column in ("stage", "peak MiB", "hours", "disk MiB", "forward passes", "large rows", "fits"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in found.stages:
        fits = {None: "", True: "yes", False: "no"}[stage.fits]
        table.add_row(
            stage.name, f"{stage.peak_bytes / 2**20:,.0f}", f"{stage.seconds / 3600:.2f}",
            f"{stage.disk_bytes / 2**20:,.0f}", f"{stage.passes:,}", f"{stage.large_rows:,}", fits,
            end_section=stage.ours and not found.stages[found.stages.index(stage) + 1].ours,
        )  # fmt: skip
    out.print(table)
    out.print(
        f"hours at this machine's rates: {found.rates.flops / 1e9:.0f} GFLOP/s in matrix products, "
        f"{found.rates.moved / 1e9:.1f} GB/s in all else"
    )
    if found.memory is not None and not all(stage.fits for stage in found.stages if stage.ours):
        what = "no setting tried makes it fit" if found.advice is None else f"it fits with {found.advice}"
        out.print(f"'{found.peak.name}' does not fit in {found.memory / 2**30:.1f} GiB; {what}")


@app.command()
def report(root: RunArg, as_json: JsonOption = False) -> None:
    """Print a finished run as a table (and write report.png) or as one JSON object."""
    from plugbridge.report import draw, read_report

    found = read_report(root)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    draw(found, root / "report.png")
    _print_table(found)
    out.print(f"picture: {root / 'report.png'}")


@app.command()
def submit(
    root: RunArg,
    out_dir: Annotated[Path, typer.Option("--out", help="directory of the leaderboard's files", show_default=False)],
    data: DataOption = None,
    model: Annotated[str, typer.Option("--model", help="a model of the run's report")] = "large_plugged",
    task: Annotated[
        str | None,
        typer.Option("--task", help="ax-b or ax-g for a run of rte  [default: the run's task]", show_default=False),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Answer SuperGLUE's unlabelled test rows with a finished run; write the leaderboard's file."""
    from plugbridge.report import read_report

    read_report(root)  # refuses what is no finished run
    config = load_config(root / "config.yaml")
    _setup(quiet)
    from plugbridge.prepare import prepare
    from plugbridge.stages.submit import submit as write_answers
    from plugbridge.tasks.spec import load_task

    prepared = prepare(config, data)
    chosen = prepared.task if task is None else load_task(task)
    folder = data if data is not None else (Path(config.data) if config.data else None)
    path = write_answers(prepared, root, chosen, model, folder, out_dir, _progress(quiet))
    out.print(f"{path}: answers of {model}")


def _print_table(found: dict[str, Any]) -> None:
    from plugbridge.report import TITLES

    first = found["rows"][0]
    table = Table(
        title=f"{found['task']}, {first['n']} {found['split']} rows; {found['method']}, "
        f"{found['mode']} coupling, Bridge {100 * found['models']['bridge']['share']:.1f} % of large",
        title_justify="left",
    )
    for column in ("model", first["metric"], "seconds", "MiB", "trainable", "changed"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in found["rows"]:
        counts = row["parameters"]
        table.add_row(
            TITLES[row["name"]], f"{row['value']:.3f}", f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{counts['trainable']:,}", f"{counts['changed']:,}",
        )  # fmt: skip
    out.print(table)
    chance = found["majority"][first["metric"]]
    pgr = found["pgr"]
    recovered = "-" if pgr is None else f"{pgr:+.2f}"
    out.print(
        "seconds and MiB: what making the model took (its stages together, peak over the stages); "
        "trainable: parameters that were trained; changed: parameters the checkpoint adds"
    )
    out.print(f"majority class {chance:.3f}; performance gap recovered (PGR) {recovered}")


def _print_loading(root: Path, found: dict[str, Any]) -> None:
    kind = "AutoModelForSeq2SeqLM" if "T5" in _architecture(found) else "AutoModelForCausalLM"
    ours = "import plugbridge  # knows the adapter; " if found["method"] == "adapter" else ""
    out.print(f"\nplugged checkpoint: {found['checkpoint']}\npicture: {root / 'report.png'}")
    out.print(
        f"\nload it:\n  {ours}from transformers import {kind}; from peft import PeftModel\n"
        f"  model = {kind}.from_pretrained({found['models']['large']['source']!r})\n"
        f"  model = PeftModel.from_pretrained(model, {found['checkpoint']!r})",
    )


def _architecture(found: dict[str, Any]) -> str:
    from plugbridge.models import load_config as model_config

    return " ".join(model_config(found["models"]["large"]["source"]).architectures or ())


def _list(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    out.print(table)


@app.command()
def families(as_json: JsonOption = False) -> None:
    """List the model families."""
    from plugbridge.families.spec import family_names, load_family

    rows = [
        {
            "name": family.name,
            "model_type": family.model_type,
            "architecture": family.architecture,
            "kind": family.kind,
            "axes": dict(family.scope),
        }
        for family in map(load_family, family_names())
    ]
    _list(rows, ("name", "architecture", "kind"), as_json)


@app.command()
def tasks(
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print prompts and metrics as Markdown")] = False,
) -> None:
    """List the tasks."""
    from plugbridge.tasks.describe import describe, tasks_markdown
    from plugbridge.tasks.spec import load_task, task_names

    found = list(map(load_task, task_names()))
    if markdown:
        sys.stdout.write(tasks_markdown(found))
        return
    _list([describe(task) for task in found], ("name", "title", "shipped", "licence"), as_json)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the parameter-efficient methods."""
    from plugbridge.tuners.table import METHODS, describe

    _list([describe(method) for method in METHODS.values()], ("name", "title", "library", "source"), as_json)


@app.command()
def explain(
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
) -> None:
    """Explain every key of a run's YAML file."""
    if markdown:
        sys.stdout.write(fields_markdown())
        return
    table = Table()
    for column in ("key", "default", "meaning"):
        table.add_column(column)
    for key, default, text in fields_help():
        table.add_row(key, default, text)
    out.print(table)


bench_app = typer.Typer(no_args_is_help=True, help="Run declared grids and write their tables and pictures.")
app.add_typer(bench_app, name="bench")

GridArg = Annotated[Path, typer.Argument(help="the grid's YAML file, such as configs/quality.yaml", show_default=False)]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="processes at a time, one thread each")]
TableOption = Annotated[
    Path | None,
    typer.Option("--table", help="Markdown file to write, JSON and PNG beside it  [default: <out>/quality.md]",
                 show_default=False),
]  # fmt: skip


@bench_app.command()
def quality(
    grid: GridArg,
    full: Annotated[bool, typer.Option("--full", help="also the grid's `full` part")] = False,
    out_dir: OutOption = None,
    table: TableOption = None,
    data: DataOption = None,
    jobs: JobsOption = 2,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="only groups whose name holds this, such as gpt2-lora; repeatable",
                     show_default=False),
    ] = None,
    sets: SetOption = None,
    summary: Annotated[bool, typer.Option("--summary", help="run nothing: write what is finished")] = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Measure the transfer against its controls over a grid of runs; interrupted, it goes on where it was."""
    from plugbridge.bench.grid import groups_of, load_grid

    loaded = load_grid(grid)
    root = out_dir if out_dir is not None else Path("runs") / grid.stem
    groups = groups_of(loaded, grid.resolve().parent, full, sets or ())
    groups = [group for group in groups if only is None or any(word in group.name for word in only)]
    _setup(quiet)
    from plugbridge.bench.present import draw_cells, page
    from plugbridge.bench.quality import cells_of, run_groups, write_cells
    from plugbridge.files import write_text

    if not summary:
        run_groups(groups, data, root, jobs, _progress(quiet))
    words = [str(grid), *(["--full"] if full else []), *(f"--set {text}" for text in sets or ())]
    command = f"plugbridge bench quality {' '.join(words)}"
    cells = cells_of(loaded, groups, root, command)
    target = table if table is not None else root / "quality.md"
    write_text(target, page(cells, "Quality of the transfer", _QUALITY, command))
    write_cells(cells, target.with_suffix(".json"))
    draw_cells(cells, target.with_suffix(".png"))
    out.print(f"{len(cells)} cells in {target}, {target.with_suffix('.json').name}, {target.with_suffix('.png').name}")


_QUALITY = """
Accuracy on test rows and performance gap recovered, PGR = (plugged - small tuned) / (large tuned - small tuned),
of the mean over seeds; small print: 95 % intervals of a bootstrap over seeds and test rows, the same rows for
all models and seeds. PGR is left empty where small and large tuned are not clearly apart. Controls stand beside the
method; "the Bridge itself" is what coupling trained and then threw away. Seconds and MiB are of coupling alone.
"""


TABLES = (*(f"table{number}" for number in range(1, 9)), "fig1a", "fig1b")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help=f"which one: {', '.join(TABLES)}", show_default=False)],
    small: Annotated[str | None, typer.Option(help="Hugging Face id or directory  [default: the paper's]")] = None,
    large: Annotated[str | None, typer.Option(help="Hugging Face id or directory  [default: the paper's]")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="the embedded pair and task: minutes instead of days")] = False,
    mode: Annotated[str, typer.Option(help="how to couple; the paper's is standalone")] = "standalone",
    tasks: Annotated[list[str] | None, typer.Option("--task", help="only this task; repeatable")] = None,
    seed: Annotated[int, typer.Option(min=0, help="one seed for every run")] = 0,
    out_dir: OutOption = None,
    target: Annotated[
        Path | None, typer.Option("--table", help="Markdown file to write; LaTeX and JSON beside it")
    ] = None,
    data: DataOption = None,
    sets: SetOption = None,
    summary: Annotated[bool, typer.Option("--summary", help="run nothing: write what is finished")] = False,
    quiet: QuietOption = False,
) -> None:
    """Make a table or figure of the paper and set its values beside ours; interrupted, it goes on where it was."""
    if table not in TABLES:
        raise ConfigError(f"no table '{table}'; known: {', '.join(TABLES)}")
    if (small is None) != (large is None):
        raise ConfigError("give both --small and --large, or neither")
    _setup(quiet)
    from plugbridge.bench.reproduce import Asked
    from plugbridge.bench.reproduce import reproduce as make

    root = out_dir if out_dir is not None else Path("runs") / "reproduce"
    page = target if target is not None else root / f"{table}.md"
    pair = None if small is None or large is None else (small, large)
    asked = Asked(
        table, pair, demo, mode, tuple(tasks) if tasks else None, seed, tuple(sets or ()), data, root, page, summary,
        "plugbridge " + " ".join(map(shlex.quote, sys.argv[1:])),
    )  # fmt: skip
    for line in make(asked, _progress(quiet), _announcer(quiet)):
        out.print(line)


@bench_app.command()
def memory(
    shapes: Annotated[str, typer.Option("--shapes", help="small, paper, gpt2-xl, t5-3b or t5-11b")] = "small",
    out_dir: OutOption = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Markdown file to write; JSON, PNG, SVG beside it  [default: <out>/memory.md]",
                     show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="memory that steps may take, such as 6GB  [default: what is free]",
                     show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="predicted beside measured, at three sizes")] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="begin no row after so many; the same command goes on from there"),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of a step")] = 1,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Peak memory and time of our stages and of other ways to tune, each measured in a process of its own."""
    from plugbridge.memory.shapes import find_shapes
    from plugbridge.memory.sizes import parse_bytes

    found = find_shapes("check" if check else shapes)
    _setup(quiet)
    from plugbridge.bench.memory import count_shape, rows_of, write_counts
    from plugbridge.bench.memory_page import MEMORY, draw_memory, memory_page
    from plugbridge.bench.memory_resume import count_resumably
    from plugbridge.cost import free_memory
    from plugbridge.files import write_text
    from plugbridge.models import pick_device

    device = pick_device("auto")
    room = parse_bytes(budget) if budget is not None else free_memory(device)
    words = ["--check" if check else f"--shapes {shapes}", *([f"--budget {budget}"] if budget is not None else [])]
    command = f"plugbridge bench memory {' '.join(words)}"
    target = table if table is not None else (out_dir or Path("runs") / "memory") / "memory.md"
    shown, left = _progress(quiet), 0
    if minutes is None:
        counts = [c for s in found for c in count_shape(s, rows_of(s, device), room, device, threads, command, shown)]
    else:
        counts, left = count_resumably(
            found, target.with_suffix(".json"), room, device, threads, command, minutes, shown
        )
    write_text(target, memory_page(counts, MEMORY, command))
    write_counts(counts, target.with_suffix(".json"))
    draw_memory(counts, [target.with_suffix(".png"), target.with_suffix(".svg")])
    worst = max((abs(c.predicted_bytes / c.peak_bytes - 1) for c in counts if c.measured), default=None)
    out.print(f"{len(counts)} counts in {target}, and beside it as JSON, PNG and SVG")
    if left > 0:
        out.print(f"{left} are left; run the same command again")
    if worst is not None:
        out.print(f"predictions are off by at most {100 * worst:.0f} % of what was measured")


def _version(show: bool) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options that stand before the command."""
    del version


def _fail(error: PlugbridgeError) -> NoReturn:
    err.print(Text.assemble(("error:", "bold red"), " ", " ".join(str(error).split())))
    sys.exit(2)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    # Before torch is imported: OpenMP threads that spin while they wait slow a busy machine down twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft imports bitsandbytes wherever it is installed, which then logs of kernels and casts nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except PlugbridgeError as error:
        _fail(error)
