"""Pictures of memory: bars, with the paper's numbers as dots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plugbridge.bench.memory import Count
from plugbridge.bench.memory_page import named_runs, paper_bytes
from plugbridge.files import write_atomically
from plugbridge.memory.rows import OURS

OWN, OTHER, DOT = "#c1440e", "#3b6ea5", "#1b1b1b"


@dataclass(frozen=True)
class Bar:
    """A bar of peak memory; `paper` in MiB."""

    name: str
    peak_bytes: int
    measured: bool
    paper: int | None

    @property
    def own(self) -> bool:
        """Whether it is one of ours."""
        return self.name.startswith(OURS)


def draw_steps(counts: Sequence[Count], paths: Sequence[Path]) -> None:
    """Every step, a panel for each model."""
    panels = {
        title: [
            Bar(step_name(count.method, count.stage), count.peak_bytes, count.measured, paper_bytes(count))
            for count in same
        ]
        for title, same in _by_model(counts).items()
    }
    _draw(panels, "peak GiB of a step (hatched: predicted)", paths)


def draw_runs(counts: Sequence[Count], paths: Sequence[Path]) -> None:
    """Figure 1(a): other ways to tune a model beside whole runs of ours, a panel for each model."""
    panels = {
        title: [Bar(name, run.top.peak_bytes, run.measured, run.paper) for name, run in named_runs(same).items()]
        for title, same in _by_model(counts).items()
    }
    _draw(panels, "peak GiB (hatched: predicted in part)", paths)


def _by_model(counts: Sequence[Count]) -> dict[str, list[Count]]:
    found: dict[str, list[Count]] = {}
    for count in counts:
        found.setdefault(f"{count.model}, batch {count.batch} x {count.length}", []).append(count)
    return found


def step_name(method: str, stage: str) -> str:
    """What no other step of a model is called."""
    return method if stage in ("train", "couple") else f"{method}: {stage}"


def _draw(panels: Mapping[str, Sequence[Bar]], label: str, paths: Sequence[Path]) -> None:
    from matplotlib.figure import Figure

    most = max(map(len, panels.values()))
    figure = Figure(figsize=(7.4 * len(panels), 0.24 * most + 1.0), layout="constrained")
    for column, (title, bars) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), column + 1)
        drawn = axes.barh(
            [bar.name for bar in bars], [bar.peak_bytes / 2**30 for bar in bars], edgecolor="white",
            color=[OWN if bar.own else OTHER for bar in bars],
        )  # fmt: skip
        for patch, bar in zip(drawn, bars, strict=True):
            patch.set_hatch("" if bar.measured else "//")
        dots = [(bar.name, bar.paper / 2**10) for bar in bars if bar.paper is not None]
        if dots:
            axes.plot([x for _, x in dots], [y for y, _ in dots], "o", ms=4, color=DOT, label="the paper")
            axes.legend(fontsize=8, frameon=False)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.tick_params(labelsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for path in paths:
        with write_atomically(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=140)
