"""A grid of runs as data: pairs x methods x tasks x seeds, each in several variants of one configuration."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from plugbridge.config import RunConfig, apply_override, parse_config, read_yaml, resolve_paths, set_value
from plugbridge.config.strict import StrictConfig
from plugbridge.errors import ConfigError, first_problem
from plugbridge.parsing import one_line, shown
from plugbridge.transfer.acting import without_idle_steps
from plugbridge.transfer.couple import find_mode

_PAIR = r"[\w+=][\w .+=-]{0,99}"
OWN = ("small", "large", "task", "seed", "method.name")
"""Keys that a grid fills in for each run."""
Settings = dict[str, Any]
"""Configuration keys with dots, such as ``couple.steps``, and their values."""


class Pair(StrictConfig):
    """A small and a large model of one family; paths are relative to the grid's file."""

    small: str
    large: str


class Variant(StrictConfig):
    """One way to couple. A control is compared with, not proposed."""

    control: bool = False
    set: Settings = Field(default_factory=dict[str, Any])


class Block(StrictConfig):
    """All combinations of some pairs, methods, tasks and variants; the first variant of a block is run whole."""

    pairs: list[str]
    methods: list[str]
    tasks: list[str]
    variants: list[str] = Field(min_length=1)
    set: Settings = Field(default_factory=dict[str, Any])


class Grid(StrictConfig):
    """A whole grid. `base` holds for every run, `methods` for the runs of one method.

    Every variant is compared with those of `compare`, answer by answer.
    """

    pairs: dict[str, Pair]
    seeds: list[int] = Field(min_length=1)
    base: Settings = Field(default_factory=dict[str, Any])
    methods: dict[str, Settings] = Field(default_factory=dict[str, Settings])
    variants: dict[str, Variant]
    compare: list[str] = Field(default_factory=list[str])
    default: list[Block]
    full: list[Block] = Field(default_factory=list[Block])


@dataclass(frozen=True)
class Group:
    """The runs of one pair, method, task and seed; they share what does not depend on the variant."""

    pair: str
    method: str
    task: str
    seed: int
    variants: tuple[tuple[str, RunConfig], ...]

    @property
    def name(self) -> str:
        return f"{self.pair}-{self.method}-{self.task}-s{self.seed}"


def load_grid(path: Path) -> Grid:
    """Read a grid. Raises ConfigError with one line."""
    try:
        grid = Grid.model_validate(read_yaml(path, "grid"))
    except ValidationError as error:
        raise ConfigError(first_problem(error, str(path))) from error
    _check_names(grid, path)
    blocks = (*grid.default, *grid.full)
    for where, settings in (
        ("base", grid.base),
        *((f"methods.{name}", settings) for name, settings in grid.methods.items()),
        *((f"variants.{name}.set", variant.set) for name, variant in grid.variants.items()),
        *(("set", block.set) for block in blocks),
    ):
        for key in OWN:
            if key in settings:
                raise ConfigError(f"{path}: {where} sets {shown(key)}, which the grid itself chooses; remove it")
    for name in grid.compare:
        if name not in grid.variants:
            raise ConfigError(f"{path}: compare: no variant {shown(name)}; known: {one_line(', '.join(grid.variants))}")
    for block in blocks:
        for kind, names, known in (("pair", block.pairs, grid.pairs), ("variant", block.variants, grid.variants)):
            for name in names:
                if name not in known:
                    raise ConfigError(f"{path}: no {kind} {shown(name)}; known: {one_line(', '.join(known))}")
    return grid


def slug(name: str) -> str:
    """A variant's folder."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def _check_names(grid: Grid, path: Path) -> None:
    """Refuse names of pairs and variants of which no folders can be made, or not one for each. Raises ConfigError."""
    for name in grid.pairs:
        if not re.fullmatch(_PAIR, name):
            raise ConfigError(f"{path}: pair {shown(name)}: expected 1 to 100 letters, digits, blanks, and . _ + = -")
    seen: dict[str, str] = {}
    for name in grid.variants:
        folder = slug(name)
        if not folder or len(name) > 100:
            raise ConfigError(f"{path}: variant {shown(name)}: expected 1 to 100 characters, a letter or digit in it")
        if folder in seen:
            raise ConfigError(f"{path}: variants {shown(seen[folder])} and {shown(name)} would share a folder")
        seen[folder] = name


def groups_of(grid: Grid, folder: Path, full: bool, overrides: Sequence[str] = ()) -> list[Group]:
    """All groups of the default grid, or of both parts, the first seed's first. Raises ConfigError.

    `folder` is the grid file's, which paths are relative to. `overrides` (``key=value``) hold for every run.
    """
    found: dict[str, Group] = {}
    for block in (*grid.default, *(grid.full if full else ())):
        for task in block.tasks:
            for seed in grid.seeds:
                for pair in block.pairs:
                    for method in block.methods:
                        group = _group(grid, folder, block, pair, method, task, seed, overrides)
                        known = found.get(group.name)
                        if known is not None:
                            old = dict(known.variants)
                            new = tuple(v for v in group.variants if v[0] not in old)
                            group = Group(pair, method, task, seed, (*known.variants, *new))
                        found[group.name] = group
    return sorted(found.values(), key=lambda group: grid.seeds.index(group.seed))


def _group(
    grid: Grid, folder: Path, block: Block, pair: str, method: str, task: str, seed: int, overrides: Sequence[str]
) -> Group:
    variants: list[tuple[str, RunConfig]] = []
    for number, name in enumerate(block.variants):
        settings: Settings = {
            "small": grid.pairs[pair].small,
            "large": grid.pairs[pair].large,
            "task": task,
            "seed": seed,
            "method.name": method,
            **grid.base,
            **grid.methods.get(method, {}),
            **block.set,
            **grid.variants[name].set,
        }
        config = _config(settings, overrides, name)
        if number > 0:  # the rest is known from the first variant
            alone = find_mode(config.couple.mode).trains_bridge
            settings["evaluate.models"] = ["large_plugged", *(["bridge_coupled"] if alone else [])]
            settings["evaluate.probe"] = settings["evaluate.proxy"] = False
            config = _config(settings, overrides, name)
        variants.append((name, resolve_paths(config, folder)))
    return Group(pair, method, task, seed, tuple(variants))


def _config(settings: Settings, overrides: Sequence[str], name: str) -> RunConfig:
    raw: Any = nested(settings)
    for text in overrides:
        raw = apply_override(raw, text)
    return without_idle_steps(parse_config(raw, f"variant {shown(name)}"))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree."""
    raw: Any = {}
    for key, value in settings.items():
        raw = set_value(raw, key, value)
    return raw
