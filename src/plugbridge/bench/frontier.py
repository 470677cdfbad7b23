"""The frontier: how much of the gap ways to tune a large model close, against what a step of each takes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plugbridge.bench.grid import Group
from plugbridge.bench.memory import Count
from plugbridge.bench.quality import Cell
from plugbridge.bench.ways import Frontier, Way
from plugbridge.errors import ConfigError
from plugbridge.files import write_json
from plugbridge.memory.rows import Row
from plugbridge.memory.shapes import SHAPES
from plugbridge.parsing import one_line, shown
from plugbridge.sources import read_model_config


@dataclass(frozen=True)
class Point:
    """One way on one pair: what it recovers of the gap, and what as much training as one step takes.

    `pgr` to `high` are the cell's (None where there is none, or no gap), `peak_bytes` and `weight_bytes`, those of
    weights that are read from memory or disk, and `seconds` the step's on the shape `model`, the latter two times the
    way's `steps`. The ratios are over the way `beside`.
    """

    way: str
    family: str
    task: str
    method: str
    value: float | None
    pgr: float | None
    low: float | None
    high: float | None
    seeds: list[int]
    model: str
    batch: int
    length: int
    peak_bytes: int
    weight_bytes: int
    seconds: float
    measured: bool
    beside: str | None
    peak_ratio: float | None
    weight_ratio: float | None
    seconds_ratio: float | None
    command: str


def steps_of(frontier: Frontier, rows: Sequence[Row]) -> list[Row]:
    """The rows that the ways' steps are. Raises ConfigError for one that there is not."""
    known = {row.name: row for row in rows}
    wanted = dict.fromkeys(way.step for way in frontier.ways.values())
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no step {shown(name)} is counted; known: {one_line('; '.join(known))}")
    return [known[name] for name in wanted]


def points_of(
    frontier: Frontier, groups: Sequence[Group], cells: Sequence[Cell], counts: Sequence[Count], command: str
) -> list[Point]:
    """The ways on every pair of the `groups` of runs: `cells` of those, `counts` of a shape of the pair's kind."""
    points: list[Point] = []
    for family, large in {group.pair: group.variants[0][1].large_path for group in groups}.items():
        kind = read_model_config(large)["model_type"]
        own = {cell.variant: cell for cell in cells if cell.family == family}
        steps = {f"{count.method}: {count.stage}": count for count in counts if _KINDS.get(count.model) == kind}
        found = {
            name: _point(name, way, frontier, family, own.get(way.cell), steps[way.step], command)
            for name, way in frontier.ways.items()
            if way.step in steps
        }
        points += [_compared(point, found) for point in found.values()]
    return points


_KINDS = {shape.name: shape.large.model_type for shapes in SHAPES.values() for shape in shapes}


def _point(
    name: str, way: Way, frontier: Frontier, family: str, cell: Cell | None, count: Count, command: str
) -> Point:
    assert count.weight_bytes is not None  # counted with every step
    return Point(
        way=name, family=family, task=frontier.task, method=frontier.method,
        value=None if cell is None else cell.value, pgr=None if cell is None else cell.pgr,
        low=None if cell is None else cell.pgr_low, high=None if cell is None else cell.pgr_high,
        seeds=[] if cell is None else cell.seeds,
        model=count.model, batch=count.batch, length=count.length, peak_bytes=count.peak_bytes,
        weight_bytes=round(way.steps * count.weight_bytes), seconds=way.steps * count.seconds,
        measured=count.measured, beside=way.beside, peak_ratio=None, weight_ratio=None, seconds_ratio=None,
        command=command,
    )  # fmt: skip


def _compared(point: Point, points: Mapping[str, Point]) -> Point:
    other = None if point.beside is None else points.get(point.beside)
    if other is None:
        return point
    fields: dict[str, Any] = asdict(point)
    fields["peak_ratio"] = point.peak_bytes / other.peak_bytes
    fields["weight_ratio"] = point.weight_bytes / other.weight_bytes
    if point.measured == other.measured:  # a prediction's seconds say nothing beside measured ones
        fields["seconds_ratio"] = point.seconds / other.seconds
    return Point(**fields)


def write_points(points: Sequence[Point], path: Path) -> None:
    """The points as one JSON list."""
    write_json(path, [asdict(point) for point in points])
