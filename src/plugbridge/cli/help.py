"""What `--help` looks like at any width: definitions beside their names, or below them where words would be broken."""

import shutil
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDEST, NARROWEST = 78, 20
SIDE_BY_SIDE = 60
"""Columns from which on a definition stands beside its name."""

_Context: Any = TyperGroup.context_class  # click's, which typer brings or imports


def columns() -> int:
    """The columns that help takes here."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns - 1))


class _Lines(_Context.formatter_class):  # pyright: ignore[reportUntypedBaseClass]
    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names and what they mean."""
        if self.width >= SIDE_BY_SIDE:
            super().write_dl(rows, col_max, col_spacing)
            return
        for name, meaning in rows:
            self.write_text(name)
            self.indent()
            self.write_text(meaning)
            self.dedent()


class _Fitting(_Context):  # pyright: ignore[reportUntypedBaseClass]
    formatter_class = _Lines


class Command(TyperCommand):
    """A command whose help fits the terminal."""

    context_class = _Fitting


class Group(TyperGroup):
    """Commands whose help fits the terminal; the epilog's lines are in two parts, which may stand one below the other.

    Parts are separated by two blanks or more.
    """

    context_class = _Fitting

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the lines that follow the options."""
        for line in (self.epilog or "").splitlines():
            first, _, second = line.strip().partition("  ")
            lead = len(line) - len(line.lstrip()) + 2
            whole = f"{'':>{lead}}{line.strip()}"
            if len(whole) <= formatter.width or not first:
                formatter.write(f"{whole}\n" if first else "\n")
                continue
            for indent, part in ((lead, first), (lead + 2, second.strip(" #"))):
                with_indent = formatter.current_indent
                formatter.current_indent = indent
                formatter.write_text(part)
                formatter.current_indent = with_indent
