"""`plugbridge bench quality`, `bench frontier` and `bench memory`."""

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from plugbridge.cli.completion import shapes as shape_names
from plugbridge.cli.help import Command, Group
from plugbridge.cli.options import MOST, DataOption, QuietOption, RunsOption, SetOption, path_in, yaml_files
from plugbridge.cli.terminal import log_here, out, progress, say, setup
from plugbridge.errors import ConfigError

bench_app = typer.Typer(cls=Group, no_args_is_help=True, help="Run declared grids and write their tables and pictures.")

GridArg = Annotated[
    Path,
    typer.Argument(
        parser=path_in("grid"),
        show_default=False,
        autocompletion=yaml_files,
        help="the grid's YAML file, such as configs/quality.yaml",
    ),
]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, max=MOST, help="processes at a time, one thread each")]
ShapesOption = Annotated[
    str, typer.Option("--shapes", help="small, paper, gpt2-xl, t5-3b or t5-11b", autocompletion=shape_names)
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help="memory that steps may take, such as 6GB  [default: what is free]", show_default=False
    ),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, max=MOST, help="CPU threads of a step")]
TableOption = Annotated[
    Path | None,
    typer.Option("--table", parser=path_in("--table"), show_default=False,
                 help="Markdown file to write, JSON and PNG beside it  [default: <out>/quality.md]"),
]  # fmt: skip


@bench_app.command(cls=Command, short_help="Measure the transfer against its controls over a grid.")
def quality(
    grid: GridArg,
    full: Annotated[bool, typer.Option("--full", help="also the grid's `full` part")] = False,
    out_dir: RunsOption = None,
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
    from plugbridge.bench.pages import check_page
    from plugbridge.files import check_folder
    from plugbridge.parsing import resolved

    loaded = load_grid(grid)
    root = out_dir if out_dir is not None else Path("runs") / grid.stem
    groups = groups_of(loaded, resolved(grid).parent, full, sets or ())
    chosen = [group for group in groups if only is None or any(word in group.name for word in only)]
    if not chosen:
        raise ConfigError(f"--only: no group's name holds that; groups: {', '.join(group.name for group in groups)}")
    log_here(quiet)
    if not summary:
        from plugbridge.preflight import check_runs

        check_runs(config for group in chosen for _, config in group.variants)
    say(f"bench quality {grid} -> {root}, {len(chosen)} groups of runs", quiet)
    target = table if table is not None else root / "quality.md"
    check_page(target)
    if not summary:
        check_folder(root, "--out must name a folder for the runs")
    setup(quiet)
    from plugbridge.bench.present import draw_cells, page
    from plugbridge.bench.quality import cells_of, left_out, run_groups, write_cells
    from plugbridge.files import write_text

    if not summary:
        run_groups(chosen, data, root, jobs, progress(quiet), grid)
    words = [str(grid), *(["--full"] if full else []), *(["--data DIR"] if data is not None else [])]
    words += [f"--set {text}" for text in sets or ()]
    command = f"plugbridge bench quality {' '.join(words)}"
    cells = cells_of(loaded, chosen, root, command)
    runs, (done, missing) = sum(len(group.variants) for group in chosen), left_out(chosen, root)
    write_text(target, page(cells, "Quality of the transfer", _QUALITY, command, runs, done, missing))
    write_cells(cells, target.with_suffix(".json"))
    draw_cells(cells, target.with_suffix(".png"))
    out.print(f"{len(cells)} cells in {target}, {target.with_suffix('.json').name}, {target.with_suffix('.png').name}")


@bench_app.command(cls=Command, short_help="What ways to tune recover, against memory, bytes and time of a step.")
def frontier(
    ways: Annotated[
        Path,
        typer.Argument(parser=path_in("ways"), show_default=False, autocompletion=yaml_files,
                       help="the YAML file of the ways, such as configs/frontier.yaml"),
    ],
    shapes: ShapesOption = "small",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="rows of a step  [default: the shape's]", show_default=False)
    ] = None,
    out_dir: RunsOption = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", parser=path_in("--table"), show_default=False,
                     help="Markdown file to write; JSON and PNG beside it  [default: <out>/frontier.md]"),
    ] = None,
    data: DataOption = None,
    jobs: JobsOption = 2,
    budget: BudgetOption = None,
    threads: ThreadsOption = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="measure only steps whose `method: stage` holds this, and predict all others; "
                     "repeatable", show_default=False),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="run and measure nothing: write what is finished, and predictions")
    ] = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Ways to tune a large model: the share of the gap each recovers, against memory, bytes and time of a step.

    Runs the ways' part of a quality grid, measures their steps on a published shape, and draws both. Interrupted, it
    goes on where it was.
    """
    from plugbridge.bench.pages import check_page
    from plugbridge.bench.ways import groups_of_ways, load_frontier
    from plugbridge.files import check_folder
    from plugbridge.memory.sizes import check_shapes, parse_bytes

    loaded, grid, grid_file = load_frontier(ways)
    groups = groups_of_ways(loaded, grid, grid_file)
    check_shapes(shapes)
    room = parse_bytes(budget) if budget is not None else None
    root = out_dir if out_dir is not None else Path("runs") / grid_file.stem
    target = table if table is not None else root / "frontier.md"
    check_page(target)
    check_folder(root, "--out must name a folder for the runs")
    say(f"bench frontier {ways} -> {target}, {len(groups)} groups of runs, shapes {shapes}", quiet)
    setup(quiet)
    from plugbridge.bench.frontier import points_of, steps_of, write_points
    from plugbridge.bench.frontier_page import draw_frontier, frontier_page
    from plugbridge.bench.memory import Count, Machine, count_shape, rows_of
    from plugbridge.bench.quality import cells_of, run_groups
    from plugbridge.cost import free_memory
    from plugbridge.files import write_text
    from plugbridge.memory.shapes import find_shapes
    from plugbridge.models import pick_device

    if not summary:
        run_groups(groups, data, root, jobs, progress(quiet), grid_file)
    words = [str(ways), f"--shapes {shapes}", *([f"--batch {batch}"] if batch is not None else [])]
    words += [*(["--data DIR"] if data is not None else []), f"--threads {threads}"]
    words += ["--summary"] if summary else []
    command = f"plugbridge bench frontier {' '.join(words)}"
    cells = cells_of(grid, groups, root, command)
    device = pick_device("auto")
    room = 0 if summary else free_memory(device) if room is None else room
    machine = Machine(room, device, threads, root / "weights", tuple(only or ()), keep_weights=False)
    counts: list[Count] = []
    for shape in find_shapes(shapes):
        sized = shape if batch is None else replace(shape, batch=batch)
        steps, kept = steps_of(loaded, rows_of(sized, device)), target.with_name(f"{target.stem}_steps.json")
        counts += count_shape(sized, steps, machine, kept, command, progress(quiet))
    points = points_of(loaded, groups, cells, counts, command)
    write_text(target, frontier_page(points, command))
    write_points(points, target.with_suffix(".json"))
    draw_frontier(points, target.with_suffix(".png"))
    out.print(f"{len(points)} ways in {target}, {target.with_suffix('.json').name}, {target.with_suffix('.png').name}")


_QUALITY = """
Accuracy on test rows and performance gap recovered, PGR = (plugged - small tuned) / (large tuned - small tuned),
of the mean over seeds; small print: 95 % intervals of a bootstrap over seeds and test rows, the same rows for
all models and seeds, a seed fewer than there are (Rao and Wu 1988). PGR is left empty where small and large tuned are
not clearly apart. "PGR above" is how much more of the gap a variant recovers than another one does, compared answer by
answer: two variants may differ clearly though their own intervals overlap. Controls stand beside the method; "the
Bridge itself" is what coupling trained and then threw away. "Large rows read" are those of importance, repair, start
and coupling, a forward pass each. Seconds and MiB are of coupling alone; MiB are over what the process
held before, and the runs of a group share a process: what one run frees may hide what the next takes, so that small
models' say little (`bench memory` measures every step in a process of its own).
"""


@bench_app.command(cls=Command, short_help="Measure peak memory and time of ours and other ways.")
def memory(
    shapes: ShapesOption = "small",
    out_dir: RunsOption = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", parser=path_in("--table"), show_default=False,
                     help="Markdown file to write; JSON, PNG, SVG beside it  [default: <out>/memory.md]"),
    ] = None,
    budget: BudgetOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="predicted beside measured at three sizes, only rows that run")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="begin no row after so many; the same command goes on from there"),
    ] = None,
    threads: ThreadsOption = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="run only rows whose `method: stage` holds this, such as ours, and predict all "
                     "others; repeatable", show_default=False),
    ] = None,
    remove_weights: Annotated[
        bool, typer.Option("--remove-weights", help="keep random weights on disk only while rows need them")
    ] = False,
    quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Peak memory and time of our stages and of other ways to tune, each measured in a process of its own.

    What the table's JSON has as measured is not measured again; remove the file to begin anew.
    """
    from plugbridge.bench.pages import check_page
    from plugbridge.files import check_folder
    from plugbridge.memory.sizes import check_shapes, parse_bytes

    name = "check" if check else shapes
    check_shapes(name)
    room = parse_bytes(budget) if budget is not None else None
    folder = out_dir or Path("runs") / "memory"
    target = table if table is not None else folder / "memory.md"
    check_page(target)
    check_folder(folder, "--out must name a folder")
    say(f"bench memory, shapes {name} -> {target}", quiet)
    setup(quiet)
    from plugbridge.bench.memory import Machine, count_shape, rows_of
    from plugbridge.bench.memory_figure import draw_steps
    from plugbridge.bench.memory_page import MEMORY, memory_page
    from plugbridge.cost import free_memory
    from plugbridge.files import write_text
    from plugbridge.memory.shapes import find_shapes
    from plugbridge.models import pick_device

    device = pick_device("auto")
    room = free_memory(device) if room is None else room
    words = ["--check" if check else f"--shapes {shapes}", *([f"--budget {budget}"] if budget is not None else [])]
    words += [f"--threads {threads}", *(f"--only {shlex.quote(part)}" for part in only or ())]
    command = f"plugbridge bench memory {' '.join(words)}"
    until = None if minutes is None else time.monotonic() + 60 * minutes
    machine = Machine(room, device, threads, folder / "weights", tuple(only or ()), until, not remove_weights)
    known = [(shape, rows_of(shape, device)) for shape in find_shapes(name)]
    names = list(dict.fromkeys(row.name for _, some in known for row in some))
    missing = next((part for part in only or () if not any(part in name for name in names)), None)
    if missing is not None:
        raise ConfigError(f"--only {shlex.quote(missing)}: no row's name holds that; rows: {'; '.join(names)}")
    rows = [(shape, [row for row in some if not check or machine.chooses(row)]) for shape, some in known]
    counts = [
        count
        for shape, some in rows
        for count in count_shape(shape, some, machine, target.with_suffix(".json"), command, progress(quiet))
    ]
    left = sum(len(some) for _, some in rows) - len(counts)
    write_text(target, memory_page(counts, MEMORY, command))
    draw_steps(counts, [target.with_suffix(".png"), target.with_suffix(".svg")])
    worst = max((abs(c.predicted_bytes / c.peak_bytes - 1) for c in counts if c.measured), default=None)
    out.print(f"{len(counts)} counts in {target}, and beside it as JSON, PNG and SVG")
    if left > 0:
        out.print(f"{left} are left; run the same command again")
    if worst is not None:
        out.print(f"predictions are off by at most {100 * worst:.0f} % of what was measured")
