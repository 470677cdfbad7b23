"""What `plugbridge reproduce` was asked for, checked before torch is imported."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from plugbridge.bench.paper import Choice, Pair, load_paper, refuse_owned, run_configs
from plugbridge.embedded import embedded
from plugbridge.errors import ConfigError
from plugbridge.parsing import resolved
from plugbridge.preflight import check_runs
from plugbridge.transfer.couple import find_mode

MEMORY_TABLES = ("table6", "table7", "fig1a")
ALL = ("mode", "task", "seed", "set", "summary")
READ = {
    "table2": (),
    "table6": ("mode", "summary"),
    "table7": ("mode", "summary"),
    "fig1a": ("summary",),
    "fig1b": ("task", "seed", "set", "summary"),
}
"""Options that a table or figure reads, where it does not read all of them."""


@dataclass(frozen=True)
class Asked:
    """What was asked for: the table, the user's models (by default the paper's) and how to run them."""

    table: str
    pair: tuple[str, str] | None
    demo: bool
    mode: str
    tasks: tuple[str, ...] | None
    seed: int
    sets: tuple[str, ...]
    data: Path | None
    root: Path
    page: Path
    summary: bool
    command: str


def check_options(table: str, given: Collection[str]) -> None:
    """Raise ConfigError for the first of the options given that a table does not read."""
    for option in given:
        if option not in READ.get(table, ALL):
            raise ConfigError(f"{table} does not read --{option}")


def check_asked(asked: Asked) -> None:
    """Raise ConfigError or ModelError for what can be told without a model, and no row of which can be made."""
    find_mode(asked.mode)
    refuse_owned(asked.sets)
    table = load_paper().tables.get(asked.table)
    if table is not None and not asked.summary:
        check_runs(run_configs(table, choice_of(asked, table.pair), asked.tasks).values())


def choice_of(asked: Asked, pair: str) -> Choice:
    """The pair that was asked for, the embedded one of a demonstration, or the paper's of that name."""
    chosen = load_paper().pairs[pair]
    if asked.pair is not None:
        chosen = Pair(small=asked.pair[0], large=asked.pair[1])
    elif asked.demo:
        folder = embedded(pair.partition("-")[0])
        chosen = Pair(small=str(resolved(folder) / "small"), large=str(resolved(folder) / "large"))
    return Choice(chosen, asked.mode, asked.seed, asked.sets, asked.demo)
