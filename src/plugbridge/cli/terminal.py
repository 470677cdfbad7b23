"""What a command prints with: standard output and error, progress bars, tables."""

import gc
import json
import logging
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from plugbridge import __version__
from plugbridge.imports import leave_out_bitsandbytes
from plugbridge.progress import Advance, Progress, Silent
from plugbridge.workers import quiet_loggers


class Screen(Console):
    """A console that leaves no line to a terminal to break: sentences go on behind a blank, tables fold or stack.

    What goes to a file or another program is a line as it is. Only words that are longer than a line are broken.
    """

    def __init__(self, **options: Any) -> None:
        # plain: what users name (paths, labels) may hold rich's own markup or emoji codes
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Print as rich does, with `soft_wrap` for what is not to be broken here."""
        soft = options.pop("soft_wrap", not self.is_terminal)
        super().print(*(objects if soft else map(self._fitting, objects)), soft_wrap=soft, **options)

    def _fitting(self, what: Any) -> Any:
        """A table in which every word has room, or its rows one below the other where no such table is as narrow."""
        if not isinstance(what, Table):
            return what
        columns = [[str(column.header), *map(str, column.cells)] for column in what.columns]
        least = [max((len(word) for text in texts for word in text.split() if "/" not in word), default=1)
                 for texts in columns]  # fmt: skip
        widths = [max(1, *(len(line) for text in texts for line in text.split("\n"))) for texts in columns]
        room = self.width - 3 * len(columns) - 1  # a line and two blanks for each, and the last line
        if sum(least) > room:
            return stacked(what)
        while sum(widths) > room:
            widths[max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)] -= 1
        for column, width in zip(what.columns, widths, strict=True):
            column.width = width
        return what


def stacked(table: Table) -> Group:
    """A table for narrow terminals: every row's first cell, and below it the others by their columns' names."""
    heads = [str(column.header).strip().replace("\n", " ") for column in table.columns]
    lines: list[Text | Padding] = [Text(str(table.title))] if table.title else []
    for row, *cells in zip(table.rows, *(column.cells for column in table.columns), strict=True):
        lines.append(Text(str(cells[0]), style=row.style or "bold"))
        named = (f"{head}: {cell}" for head, cell in zip(heads[1:], cells[1:], strict=True) if str(cell))
        lines += [Padding(Text(text), (0, 0, 0, 2), expand=False) for text in named]
    return Group(*lines)


out = Screen()
err = Screen(stderr=True)


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
        err.print("  loading libraries and models …")
        log_below(COMMAND)


class _Said(logging.Handler):
    """What the library logs, on standard error as it is when it is said, below the line that it belongs to."""

    indent = 0

    def emit(self, record: logging.LogRecord) -> None:
        _print_behind(self.indent, record.getMessage())


COMMAND, STAGE = 2, 6
"""Blanks before what is said below a command's first line, and below a stage's."""
_said = _Said()


def _print_behind(indent: int, line: str) -> None:
    if err.is_terminal:
        err.print(Padding(Text(line), (0, 0, 0, indent), expand=False))
    else:
        err.print(f"{'':{indent}}{line}")


def log_below(indent: int) -> None:
    """Print what our loggers say from now on behind so many blanks."""
    _said.indent = indent


def log_here(quiet: bool) -> None:
    """Print what our own loggers say; the root logger and those of others are their owners'."""
    ours = logging.getLogger("plugbridge")
    ours.setLevel(logging.WARNING if quiet else logging.INFO)
    if _said not in ours.handlers:
        ours.addHandler(_said)


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
    """What prints every run as it begins, and below it why it could not be done."""

    def announce(run: str, what: str) -> None:
        if quiet:
            return
        if what == "running":
            err.print(f"  {run}")
            log_below(STAGE)
        else:
            _print_behind(STAGE, what)

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


def say_code(text: str) -> None:
    """Print lines that are copied, as they are: a line's end in them would be copied, too."""
    out.print(text, soft_wrap=True)


def say_command(words: Sequence[str]) -> None:
    """Print a command that is copied; a shell reads it over several lines where a terminal is too narrow for one."""
    lines, width = [f"  {words[0]}"], out.width - 2 if out.is_terminal else None
    for word in words[1:]:
        if width is not None and len(lines[-1]) + 1 + len(word) > width:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    say_code(" \\\n".join(lines))
