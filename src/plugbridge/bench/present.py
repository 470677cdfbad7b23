"""Cells as a Markdown page and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from plugbridge.bench.commits import commits_said
from plugbridge.bench.quality import REFERENCES, Cell
from plugbridge.files import write_atomically

COLOURS = (
    "#c1440e", "#3b6ea5", "#5b8c5a", "#8a5a83", "#b8860b", "#2ca9a1", "#7a7a7a", "#1b1b1b", "#e377c2", "#9acd32",
    "#6a3d9a", "#a6761d", "#66c2ff", "#fb9a99",
)  # fmt: skip


def page(
    cells: Sequence[Cell],
    title: str,
    about: str,
    command: str,
    runs: int = 0,
    done: int = 0,
    missing: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """A Markdown page: one table for each task, family and method.

    `runs` is how many runs the grid has, `done` how many are done, `missing` the variants that are not, by their place
    (none where nothing is done there).
    """
    if {cell.split for cell in cells} == {"validation"}:
        about = about.replace("test rows", "validation rows")
    lines = [f"# {title}", "", about.strip(), "", "Made by", "", f"    {command}", ""]
    lines += _missing(runs, done, missing)
    lines += _summary(cells)
    for task, family, method, commits in _places(cells):
        same = [c for c in cells if _place(c) == (task, family, method, commits)]
        lines += [f"## {task}, {family}, {method}{f', {commits}' if commits else ''}", ""]
        first = same[0]
        seeds = ", ".join(map(str, first.seeds))
        lines += [f"{first.n} {first.split} rows, seeds {seeds}, majority class {first.majority:.3f}.", ""]
        others = list(dict.fromkeys(name for cell in cells for name in cell.differences))
        names = ["coupling", "accuracy", "PGR", *(f"PGR above {name}" for name in others)]
        names += ["Bridge share", "large rows read", "seconds", "MiB"]
        lines += [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        lines += [_line(cell, first.seeds, others) for cell in same]
        lines.append("")
    return "\n".join(lines)


def _missing(runs: int, done: int, missing: Mapping[str, Sequence[str]]) -> list[str]:
    if not missing:
        return []
    lines = [f"{done} of the grid's {runs} runs are done. Not run, or not with all seeds:", ""]
    lines += [f"- {place}: {'; '.join(names)}" for place, names in missing.items() if names]
    if nothing := [place for place, names in missing.items() if not names]:
        lines.append(f"- all of: {'; '.join(nothing)}")
    return [*lines, ""]


def _places(cells: Sequence[Cell]) -> list[tuple[str, str, str, str]]:
    return list(dict.fromkeys(map(_place, cells)))


def _place(cell: Cell) -> tuple[str, str, str, str]:
    """What cells of one table have in common."""
    return cell.task, cell.family, cell.method, commits_said(cell.commits)


def _row(cell: Cell) -> str:
    """What a picture's row is of."""
    return "\n".join(filter(None, (cell.task, cell.family, commits_said(cell.commits))))


def _kind(cell: Cell) -> str:
    if cell.control is None:
        return f"**{cell.variant}**"
    plain = cell.variant in REFERENCES.values() or "the Bridge itself" in cell.variant
    return cell.variant if plain else f"control: {cell.variant}"


def _line(cell: Cell, seeds: list[int], others: Sequence[str]) -> str:
    pgr = "" if cell.pgr is None else _signed(cell.pgr, cell.pgr_low or 0.0, cell.pgr_high or 0.0)
    above = "".join(f"{_signed(*cell.differences[o]) if o in cell.differences else ''} | " for o in others)
    share = _bridge(cell)
    rows = "" if cell.large_rows is None else f"{cell.large_rows:,}"
    seconds = "" if cell.seconds is None else f"{cell.seconds:.0f}"
    peak = "" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}"
    mode = "" if cell.mode == "none" else f"{cell.mode}, {cell.start} start"
    fewer = "" if cell.seeds == seeds else f" (seeds {', '.join(map(str, cell.seeds))} only)"
    return (
        f"| {_kind(cell)}{fewer} | {mode} | {cell.value:.3f} <sub>{cell.low:.3f} to {cell.high:.3f}</sub> "
        f"| {pgr} | {above}{share} | {rows} | {seconds} | {peak} |"
    )


def _bridge(cell: Cell) -> str:
    """The Bridge's share of the large model's parameters, or its bits and its share of the bytes in bfloat16."""
    if cell.bridge_share is None:
        return ""
    if cell.bits in (None, 16) or cell.bridge_bytes_share is None:
        return f"{100 * cell.bridge_share:.1f} %"
    return f"{cell.bits} bits, {100 * cell.bridge_bytes_share:.1f} % of the bytes"


def _signed(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} <sub>{low:+.2f} to {high:+.2f}</sub>"


def _summary(cells: Sequence[Cell]) -> list[str]:
    """Mean PGR over tasks and families, by method and variant."""
    variants = list(dict.fromkeys(c.variant for c in cells if c.mode != "none"))
    methods = list(dict.fromkeys(c.method for c in cells))
    about = "(of how many cells, in brackets; rows of different cells do not compare)"
    lines = ["## PGR, mean over families and tasks", "", about, ""]
    lines += ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for variant in variants:
        row: list[str] = []
        for method in methods:
            found = [c.pgr for c in cells if (c.variant, c.method) == (variant, method) and c.pgr is not None]
            row.append(f"{sum(found) / len(found):+.2f} ({len(found)})" if found else "")
        name = _kind(next(c for c in cells if c.variant == variant))
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return [*lines, ""]


def draw_cells(cells: Sequence[Cell], path: Path) -> None:
    """A panel for each method: PGR with its interval, a row for each task and family; squares are controls."""
    from matplotlib.figure import Figure

    shown = [c for c in cells if c.pgr is not None and c.mode != "none" and "the Bridge itself" not in c.variant]
    methods = list(dict.fromkeys(cell.method for cell in shown))
    variants = list(dict.fromkeys(cell.variant for cell in shown))
    places = list(dict.fromkeys(map(_row, shown)))
    height = 0.16 * len(variants) * len(places) + 1.6
    figure = Figure(figsize=(3.6 * max(1, len(methods)) + 1.8, height), layout="constrained")
    for column, method in enumerate(methods):
        axes = figure.add_subplot(1, len(methods), column + 1)
        for number, variant in enumerate(variants):
            found = [cell for cell in shown if (cell.method, cell.variant) == (method, variant)]
            if not found:
                continue
            at = [places.index(_row(c)) + 0.8 * (number / max(1, len(variants)) - 0.4) for c in found]
            values = [c.pgr or 0.0 for c in found]
            spans = [
                [max(0.0, v - (c.pgr_low or 0.0)) for v, c in zip(values, found, strict=True)],
                [max(0.0, (c.pgr_high or 0.0) - v) for v, c in zip(values, found, strict=True)],
            ]
            axes.errorbar(
                values, at, xerr=spans, fmt="s" if found[0].control else "o", ms=4, lw=1, capsize=2, label=variant,
                color=COLOURS[number % len(COLOURS)],
            )  # fmt: skip
        axes.axvline(0, color="#222222", lw=1, ls=":")
        axes.axvline(1, color="#222222", lw=1)
        ends = [x for c in shown for x in (c.pgr_low or 0.0, c.pgr_high or 0.0)]
        axes.set_xlim(max(-2.0, min(-0.5, *ends) - 0.05), min(2.5, max(1.25, *ends) + 0.05))
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_yticks(range(len(places)), places if column == 0 else [""] * len(places), fontsize=8)
        axes.set_title(method, fontsize=10, loc="left")
        axes.set_xlabel("PGR: 0 small tuned, 1 large tuned", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if shown:
        handles: dict[str, object] = {}
        for axes in figure.axes:
            handles.update(
                {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            )
        figure.legend(
            list(handles.values()),  # pyright: ignore[reportArgumentType]
            list(handles), loc="outside lower center", ncols=3, fontsize=8, frameon=False,
        )  # fmt: skip
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
