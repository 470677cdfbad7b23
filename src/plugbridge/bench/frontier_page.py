"""The frontier as a Markdown page and a picture."""

from collections.abc import Sequence
from pathlib import Path

from plugbridge.bench.frontier import Point
from plugbridge.bench.present import COLOURS
from plugbridge.files import write_atomically

FRONTIER = """
What ways to tune a large model recover of the gap, PGR = (way - small tuned) / (large tuned - small tuned), against
what a step of each takes. PGR comes from the runs of the grid, on the embedded pairs, its 95 % interval from a
bootstrap over seeds and rows. What a step takes was counted on the shape named, with random weights: peak memory with
the model and all that the step holds; "weights read", the bytes of the models' weights that the step reads, as often as
it does, from memory or (`streamed`: the large model on disk, one block in memory and one read ahead) from disk, counted
from shapes; seconds of one repetition, those of predicted rows from this machine's rates. Ratios are over the way that
holds the large model alike: LoRA with checkpointing, or exact backpropagation block by block, in the same run of the
command. Of a way that takes more steps, seconds and bytes are of as many as stand for one of the others'. Proxy-tuning
trains the small model alone; counted is what reading a batch with three models takes.
"""
AXES = {
    "peak_bytes": ("peak GiB", 2**30),
    "weight_bytes": ("GiB of weights read a step", 2**30),
    "seconds": ("seconds a step", 1),
}


def frontier_page(points: Sequence[Point], command: str) -> str:
    """A table for each pair, and the command that makes it."""
    lines = ["# The frontier", "", FRONTIER.strip(), "", "Made by", "", f"    {command}", ""]
    for family in dict.fromkeys(point.family for point in points):
        same = [point for point in points if point.family == family]
        first = same[0]
        tokens = f"{first.batch} x {first.length} tokens"
        lines += [
            f"## {family}, {first.method} on {first.task}; steps on {first.model}, {tokens}",
            "",
            "| way | PGR | peak MiB | x | weights read, MiB | x | seconds | x | | beside |",
            "|---" * 10 + "|",
        ]
        lines += [_line(point) for point in same]
        lines.append("")
    return "\n".join(lines)


def _line(point: Point) -> str:
    pgr = "" if point.pgr is None else f"{point.pgr:+.2f} <sub>{point.low:+.2f} to {point.high:+.2f}</sub>"
    ratios = ["" if r is None else f"{r:.2f}" for r in (point.peak_ratio, point.weight_ratio, point.seconds_ratio)]
    how = "measured" if point.measured else "predicted"
    return (
        f"| {point.way} | {pgr} | {point.peak_bytes / 2**20:,.0f} | {ratios[0]} "
        f"| {point.weight_bytes / 2**20:,.0f} | {ratios[1]} | {point.seconds:.1f} | {ratios[2]} | {how} "
        f"| {point.beside or ''} |"
    )


def draw_frontier(points: Sequence[Point], path: Path) -> None:
    """A row for each pair: PGR against memory, weights read and seconds; circles are ways with the model in memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [point for point in points if point.pgr is not None]
    families = list(dict.fromkeys(point.family for point in shown))
    ways = list(dict.fromkeys(point.way for point in shown))
    figure = Figure(figsize=(13, 3.6 * max(1, len(families)) + 1.9), layout="constrained")
    for row, family in enumerate(families):
        same = [point for point in shown if point.family == family]
        for column, (name, (label, unit)) in enumerate(AXES.items()):
            axes = figure.add_subplot(len(families), len(AXES), row * len(AXES) + column + 1)
            for point in same:
                value, low, high = point.pgr or 0.0, point.low or 0.0, point.high or 0.0
                number = ways.index(point.way)
                axes.errorbar(
                    [getattr(point, name) / unit], [value], yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    fmt="^" if "streamed" in point.way else "o", ms=5, lw=1, capsize=2, label=point.way,
                    color=COLOURS[number % len(COLOURS)], mfc="white" if number >= len(COLOURS) else None,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.axhline(1, color="#222222", lw=1)
            axes.axhline(0, color="#222222", lw=1, ls=":")
            axes.set_xlabel(f"{label}, {same[0].model}, {same[0].batch} x {same[0].length}", fontsize=8)
            axes.set_ylabel("PGR" if column == 0 else "", fontsize=8)
            axes.set_title(family if column == 0 else "", fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
    if shown:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels,  # pyright: ignore[reportArgumentType]
            loc="outside lower center", ncols=4, fontsize=8, frameon=False,
        )  # fmt: skip
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
