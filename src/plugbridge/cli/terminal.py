"""What a command prints with: standard output and error, progress bars, tables."""

import gc
import json
import logging
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plugbridge import __version__
from plugbridge.imports import leave_out_bitsandbytes
from plugbridge.progress import Advance, Progress, Silent
from plugbridge.workers import quiet_loggers

# plain: what users name (paths, labels) may hold rich's own markup or emoji codes
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


class Bars:
    """Progress drawn with rich on standard error."""

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        from plugbridge.cli.job import Job  # rich's progress takes a while to import

        with Job(quiet=False).bar(title, total, done) as advance:
            yield advance


def progress(quiet: bool) -> Progress:
    """Bars on a terminal, else nothing."""
    return Silent() if quiet or not err.is_terminal else Bars()


def say(what: str, quiet: bool) -> None:
    """A command's first line, before what takes seconds to import: nobody shall look at silence."""
    if not quiet:
        err.print(Text.assemble((f"plugbridge {__version__}", "bold"), f" {what}"))
        err.print("  loading libraries and models …", soft_wrap=True)


class _Said(logging.Handler):
    """What the library logs, on standard error, as it is when it is said."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage())


def log_here(quiet: bool) -> None:
    """Print what our own loggers say; the root logger and those of others are their owners'."""
    ours = logging.getLogger("plugbridge")
    ours.setLevel(logging.WARNING if quiet else logging.INFO)
    if not any(isinstance(handler, _Said) for handler in ours.handlers):
        ours.addHandler(_Said())


def setup(quiet: bool) -> None:
    """Log what the library says, or only its warnings; keep other libraries quiet."""
    log_here(quiet)
    quiet_loggers()
    leave_out_bitsandbytes()  # what is quantised brings it back
    gc.disable()  # or much of the imports' time goes into looking for garbage where there is none
    try:
        from plugbridge.models import quiet_transformers  # heavy: after the loggers are quiet
    finally:
        gc.enable()
    quiet_transformers()


def announcer(quiet: bool) -> Callable[[str, str], None]:
    """What prints every stage as it starts or is skipped."""

    def announce(stage: str, what: str) -> None:
        if not quiet:
            text = f"  {stage:<9} done before, skipped" if what == "skipped" else f"  {stage}"
            err.print(text)

    return announce


def print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Rows as a table of some of their columns, or whole as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    out.print(rows_table(rows, columns))


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Rows as a table of some columns; the first, which is typed as it stands, is whole at any width."""
    table, widest = Table(), max((len(str(row[columns[0]])) for row in rows), default=0)
    for column in columns:
        table.add_column(column, overflow="fold", min_width=widest if column == columns[0] else None)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    return table


def say_prose(text: str) -> None:
    """Print sentences, which a terminal breaks at blanks; never what is copied, such as commands and paths."""
    out.print(text, soft_wrap=not out.is_terminal)
