"""`plugbridge reproduce`: a table or figure of the paper."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from plugbridge.cli.completion import modes, one_of
from plugbridge.cli.completion import tasks as task_names
from plugbridge.cli.options import DataOption, QuietOption, RunsOption, SetOption, model_in, path_in
from plugbridge.cli.terminal import announcer, log_here, out, progress, say, setup
from plugbridge.errors import ConfigError
from plugbridge.parsing import shown

TABLES = (*(f"table{number}" for number in range(1, 9)), "fig1a", "fig1b")


def reproduce(
    table: Annotated[
        str,
        typer.Argument(
            help=f"which one: {', '.join(TABLES)}",
            show_default=False,
            autocompletion=one_of(lambda: TABLES),
        ),
    ],
    small: Annotated[
        str | None,
        typer.Option(parser=model_in("--small"), help="Hugging Face id or directory  [default: the paper's]"),
    ] = None,
    large: Annotated[
        str | None,
        typer.Option(parser=model_in("--large"), help="Hugging Face id or directory  [default: the paper's]"),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="the embedded pair and task: minutes instead of days")] = False,
    mode: Annotated[
        str | None, typer.Option(help="how to couple  [default: standalone, the paper's]", autocompletion=modes)
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="only this task; repeatable", autocompletion=task_names)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="one seed for every run  [default: 0]")] = None,
    out_dir: RunsOption = None,
    target: Annotated[
        Path | None,
        typer.Option("--table", parser=path_in("--table"), help="Markdown file to write; LaTeX and JSON beside it"),
    ] = None,
    data: DataOption = None,
    sets: SetOption = None,
    summary: Annotated[bool, typer.Option("--summary", help="run nothing: write what is finished")] = False,
    quiet: QuietOption = False,
) -> None:
    """Make a table or figure of the paper and set its values beside ours; interrupted, it goes on where it was."""
    if table not in TABLES:
        raise ConfigError(f"no table {shown(table)}; known: {', '.join(TABLES)}")
    if (small is None) != (large is None):
        raise ConfigError("give both --small and --large, or neither")
    from plugbridge.bench.asked import Asked, check_asked, check_options
    from plugbridge.bench.pages import check_page
    from plugbridge.files import check_folder

    options = {"mode": mode, "task": tasks, "seed": seed, "set": sets, "summary": summary or None}
    check_options(table, [name for name, value in options.items() if value is not None])

    root = out_dir if out_dir is not None else Path("runs") / "reproduce"
    page = target if target is not None else root / f"{table}.md"
    check_page(page)
    if not summary:
        check_folder(root, "--out must name a folder for the runs")
    pair = None if small is None or large is None else (small, large)
    asked = Asked(
        table, pair, demo, mode or "standalone", tuple(tasks) if tasks else None, seed or 0, tuple(sets or ()), data,
        root, page, summary, "plugbridge " + " ".join(map(shlex.quote, sys.argv[1:])),
    )  # fmt: skip
    log_here(quiet)
    check_asked(asked)
    say(f"reproduce {table} -> {page}", quiet)
    setup(quiet)
    from plugbridge.bench.reproduce import reproduce as make

    for line in make(asked, progress(quiet), announcer(quiet)):
        out.print(line)
