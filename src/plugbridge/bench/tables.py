"""Reproduced tables as Markdown and LaTeX."""

from collections.abc import Sequence

from plugbridge.bench.cells import SHARE, Reproduced


def markdown(cells: Sequence[Reproduced], title: str, note: str, command: str) -> str:
    """A page: ours, in brackets the paper's value and the difference; then how each row was made."""
    columns = _columns(cells)
    lines = [f"# {title}", "", note, "", "Each cell: ours (the paper's, difference). An empty cell was not run.", ""]
    lines += ["Made by", "", f"    {command}", ""]
    lines += ["| | " + " | ".join(_heading(column) for column in columns) + " |", "|---|" + "---|" * len(columns)]
    for row in _rows(cells):
        lines.append(f"| {row} | " + " | ".join(_text(cells, row, column, "-") for column in columns) + " |")
    missing = [cell for cell in cells if cell.value is None and cell.obtained != "not run"]
    for title, some in (
        ("Not run:", missing),
        ("How each was obtained:", [cell for cell in cells if cell.value is not None]),
    ):
        if some:
            lines += ["", title, "", *_origins(some)]
    return "\n".join(lines) + "\n"


def latex(cells: Sequence[Reproduced], title: str, note: str, command: str) -> str:
    """The same as a LaTeX table (booktabs); how each row was made stands in comments."""
    columns = _columns(cells)
    head = " & ".join(["", *(_escaped(_heading(column)) for column in columns)])
    lines = ["% Made by", f"%     {command}", "% An empty cell was not run. How each was obtained:"]
    lines += [f"% {line}" for line in _origins(cells)]
    lines += [r"\begin{table}", r"\centering", r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule"]
    lines += [head + r" \\", r"\midrule"]
    for row in _rows(cells):
        lines.append(" & ".join([_escaped(row), *(_text(cells, row, column, "--") for column in columns)]) + r" \\")
    what = "Ours (paper, difference)" if any(cell.printed is not None for cell in cells) else "Ours"
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_escaped(f'{title}. {what}. {note}'.replace('`', ''))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _origins(cells: Sequence[Reproduced]) -> list[str]:
    """Where cells come from: a line for a row, or for each of its tasks where they differ."""
    lines: list[str] = []
    for row in _rows(cells):
        same = {
            cell.task: cell.obtained if cell.n is None else f"{cell.obtained}, {cell.n:,} rows"
            for cell in cells
            if cell.row == row
        }
        alike = len(set(same.values())) == 1
        lines += [f"- {row}: {text}" if alike else f"- {row}, {task}: {text}" for task, text in same.items()]
    return list(dict.fromkeys(lines))


def _columns(cells: Sequence[Reproduced]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.task, cell.metric) for cell in cells))


def _rows(cells: Sequence[Reproduced]) -> list[str]:
    return list(dict.fromkeys(cell.row for cell in cells))


def _heading(column: tuple[str, str]) -> str:
    return f"{column[0]}, {column[1]}"


def _text(cells: Sequence[Reproduced], row: str, column: tuple[str, str], minus: str) -> str:
    cell = next(c for c in cells if (c.row, c.task, c.metric) == (row, *column))
    few = (cell.value or 0) < 10
    digits = 3 if cell.metric == "million parameters" and few else 2 if cell.metric == SHARE and few else 1
    ours = "" if cell.value is None else f"{cell.value:.{digits}f}"
    if cell.printed is None:
        return ours
    digits = 2 if cell.metric == SHARE and 0 < cell.printed < 100 else 1
    if cell.difference is None:
        return f"({cell.printed:.{digits}f})"
    sign = "+" if cell.difference >= 0 else minus
    return f"{ours} ({cell.printed:.{digits}f}, {sign}{abs(cell.difference):.{digits}f})"


def _escaped(text: str) -> str:
    for sign in "_%&#":
        text = text.replace(sign, rf"\{sign}")
    return text
