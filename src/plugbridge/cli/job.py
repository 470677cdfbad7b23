"""How far a run is: a line under each stage while it works, and one when it ends."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, Task
from rich.text import Text

from plugbridge.cli.terminal import COMMAND, STAGE, err, log_below
from plugbridge.markers import read_marker
from plugbridge.progress import Advance, ignore
from plugbridge.report import bridge_said

WIDEST_BAR = 24
SOON = 0.01
"""Share of the whole work before which nobody knows how long it will take."""


@dataclass
class Job:
    """A run's stages as they are done: their places, and seconds that are left by the work in each.

    `loads` is how much work each stage is beside the others, roughly (`stages.load`).
    """

    quiet: bool
    root: Path = Path()
    loads: Mapping[str, float] = field(default_factory=dict[str, float])
    spent: float = 0.0
    done: float = 0.0
    stage: str = ""
    begun: float = 0.0
    bars: int = 0
    share: float = 0.0

    def follow(self, root: Path, loads: Mapping[str, float]) -> None:
        """Tell the stages that will be done, in order, and where."""
        self.root, self.loads = root, loads

    def announce(self, stage: str, what: str) -> None:
        """Take note that a stage is ``running``, or ``skipped``, and print it."""
        if what == "running":
            self.stage, self.begun, self.bars, self.share = stage, time.monotonic(), 0, 0.0
        else:
            self._count(stage)
        if not self.quiet:
            err.print(f"  {self._place(stage)}{stage}{'' if what == 'running' else ': done before, skipped'}")
            log_below(STAGE if what == "running" else COMMAND)

    def end(self, stage: str) -> None:
        """Take note that a stage is done, and print what it took and gave."""
        marker = self._count(stage)
        if not self.quiet and marker is not None:
            for line in ended(err.width if err.is_terminal else None, f"  {self._place(stage)}{stage}", marker):
                err.print(line)
            log_below(COMMAND)

    def _count(self, stage: str) -> dict[str, Any] | None:
        """A finished stage's marker; its rate tells how long the others will take."""
        self.stage, marker = "", read_marker(self.root / stage)
        if marker is not None:
            self.spent, self.done = self.spent + marker["seconds"], self.done + self.loads.get(stage, 0.0)
        return marker

    def _place(self, stage: str) -> str:
        names = list(self.loads)
        return f"{names.index(stage) + 1}/{len(names)} " if stage in names and len(names) > 1 else ""

    def seconds_left(self) -> float | None:
        """Seconds until the run is done, at the rate of the work so far; None where too little of it is done."""
        whole = sum(self.loads.values())
        done = self.done + self.loads.get(self.stage, 0.0) * self.share
        if whole <= 0 or done < SOON * whole:
            return None
        spent = self.spent + (time.monotonic() - self.begun if self.stage else 0.0)
        return spent / done * (whole - done)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        """Show a piece of work on the terminal; the first one of a stage is its main one."""
        self.bars += 1
        main = self.bars == 1
        if self.quiet or not err.is_terminal:
            yield ignore
            return
        with RichProgress(_Line(self), console=err, transient=True) as shown:
            task = shown.add_task(title, total=total, completed=done, note="")

            def advance(count: int, note: str = "") -> None:
                shown.update(task, advance=count, note=note or shown.tasks[0].fields["note"])
                if main and total > 0:
                    self.share = min(1.0, shown.tasks[0].completed / total)

            yield advance


class _Line(ProgressColumn):
    """All of a bar in one column, as wide as the terminal."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def render(self, task: Task) -> Text:
        left = self.job.seconds_left()
        return Text(
            bar_line(
                err.width - 1, task.description, int(task.completed), int(task.total or 0), str(task.fields["note"]),
                task.time_remaining, left,
            ),
            no_wrap=True,
        )  # fmt: skip


def bar_line(width: int, title: str, done: int, total: int, note: str, left: float | None, whole: float | None) -> str:
    """A piece of work in one line of at most `width` characters: what matters most, and a bar where there is room.

    The title gives way first, for the line above says the stage; then the note, then the whole run's time.
    """
    count, room = f"{done:,}/{total:,}", width - len(f"  {done:,}/{total:,}")
    time_left = next((text for text in times(left, whole) if len(text) + 2 <= room), "")
    room -= len(time_left) + 2 if time_left else 0
    note = note if len(note) + 2 <= room else ""
    room -= len(note) + 2 if note else 0
    begun = title[: max(0, room - 2)].rpartition(" ")[0].rstrip()  # in whole words, and before the mark that more comes
    head = f"  {title}" if len(title) + 2 <= room else f"  {begun}…" if begun else ""
    line = head + "".join(f"  {part}" for part in (count, note, time_left) if part)
    spare = min(WIDEST_BAR, width - len(line) - 2)
    if spare < 8 or total <= 0:
        return line
    full = round(spare * min(1.0, done / total))
    return f"{head}  {'━' * full}{'─' * (spare - full)}{line[len(head) :]}"


def times(left: float | None, whole: float | None) -> list[str]:
    """The time left for a piece of work and for the whole run, in words; the shorter texts last."""
    if left is None or whole is None:
        return [f"{clock(left)} left"] if left is not None else [f"{clock(whole)} left in all"] if whole else []
    return [f"{clock(left)} left, {clock(whole)} in all", f"{clock(left)} left"]


def clock(seconds: float) -> str:
    """Seconds as people read a clock: ``0:40``, ``1:02:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ended(width: int | None, head: str, marker: Mapping[str, Any]) -> list[str]:
    """What a stage took and gave, in one line, or in as many as a narrow terminal needs."""
    parts = [f"{marker['seconds']:,.0f} s", f"{marker['peak_bytes'] / 2**20:,.0f} MiB", *results(marker["facts"])]
    lines = [head]
    for number, part in enumerate(parts):
        joint = ": " if number == 0 else ", "
        if width is not None and len(lines[-1]) + len(joint) + len(part) > width:
            lines.append(f"{'':{STAGE}}{part}")
        else:
            lines[-1] += f"{joint}{part}"
    return lines


def results(facts: Mapping[str, Any]) -> list[str]:
    """What a stage gave, as far as its facts have it: the loss, a validation value, the Bridge's share, the scores."""
    found: list[str] = []
    if facts.get("loss_first") is not None:
        found.append(f"loss {facts['loss_first']:.3g} -> {facts['loss_last']:.3g}")
    for name, value in list(facts.get("validation", {}).items())[:1]:
        found.append(f"validation {name} {value:.3f}")
    if "bridge_share" in facts:
        bits, share = facts.get("bits", 16), facts["bridge_share"]  # absent from older runs
        found.append(bridge_said({"bits": bits, "share": share, "bytes_share": facts.get("bridge_bytes_share")}))
    if "samples" in facts:
        found.append(f"{facts['importance']} of {facts['samples']:,} rows")
    if "tensors" in facts:
        found.append(f"{facts['changed']:,} parameters")
    plugged = facts.get("large_plugged")
    if plugged is not None:
        found.append(f"large, plugged: {next(iter(plugged['metrics'].values())):.3f}")
    return found
