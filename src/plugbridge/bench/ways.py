"""Ways to tune a large model as data: their cells in a grid of runs, their steps on a published shape."""

from dataclasses import replace
from pathlib import Path

from pydantic import Field, ValidationError

from plugbridge.bench.grid import Grid, Group, groups_of, load_grid
from plugbridge.config import read_yaml
from plugbridge.config.strict import StrictConfig
from plugbridge.errors import ConfigError, first_problem
from plugbridge.parsing import one_line, resolved, shown


class Way(StrictConfig):
    """A way to tune a large model: its cell in a grid of runs, and its step among those of `bench memory`.

    `steps` are taken for one of the others'; `beside` is the way that it is compared with.
    """

    cell: str
    step: str
    steps: float = Field(default=1, gt=0)
    beside: str | None = None


class Frontier(StrictConfig):
    """The ways, by name, and which runs of which grid their cells are of."""

    grid: str
    task: str
    method: str
    ways: dict[str, Way] = Field(min_length=1)


def load_frontier(path: Path) -> tuple[Frontier, Grid, Path]:
    """Read the ways, and the grid that their runs are of; its path is relative to theirs. Raises ConfigError."""
    try:
        found = Frontier.model_validate(read_yaml(path, "frontier"))
    except ValidationError as error:
        raise ConfigError(first_problem(error, str(path))) from error
    for name, way in found.ways.items():
        if way.beside is not None and way.beside not in found.ways:
            known = one_line(", ".join(found.ways))
            raise ConfigError(f"{path}: {shown(name)} stands beside {shown(way.beside)}, no way of it; known: {known}")
    grid_file = path.parent / found.grid
    return found, load_grid(grid_file), grid_file


def groups_of_ways(frontier: Frontier, grid: Grid, grid_file: Path) -> list[Group]:
    """The grid's runs that the ways' cells are of; each group's first, which makes the references, among them.

    Raises ConfigError where there is none.
    """
    wanted = {way.cell for way in frontier.ways.values()}
    groups = [
        replace(group, variants=tuple(v for i, v in enumerate(group.variants) if i == 0 or v[0] in wanted))
        for group in groups_of(grid, resolved(grid_file).parent, full=True)
        if (group.task, group.method) == (frontier.task, frontier.method)
    ]
    if not groups:
        raise ConfigError(f"{grid_file} has no runs of {shown(frontier.method)} on {shown(frontier.task)}")
    return groups
