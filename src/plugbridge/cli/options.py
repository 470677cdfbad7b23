"""Arguments and options that several commands share."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from plugbridge.cli.completion import settings
from plugbridge.errors import ConfigError
from plugbridge.parsing import path_of

MOST = 1024
"""Threads of a process, and processes at a time, that can be asked for."""


def path(text: str) -> Path:
    """A path on the command line, `~` expanded: shells leave it in `--out=~/run`. Raises ConfigError."""
    if not text.strip():
        raise ConfigError("an empty path names nothing; give one, such as . for this directory")
    return path_of(text, "path", ConfigError)


def yaml_files(given: str) -> list[str]:
    """Directories and YAML files that begin as what was typed, for the shell's completion."""
    folder = Path(given) if given.endswith("/") else Path(given).parent
    with suppress(OSError):
        found = [p for p in sorted(folder.iterdir()) if p.is_dir() or p.suffix in (".yaml", ".yml")]
        names = [f"{p}/" if p.is_dir() else str(p) for p in found if not p.name.startswith(".")]
        return [name for name in names if name.startswith(given)]
    return []


ConfigArg = Annotated[
    Path,
    typer.Argument(
        parser=path, show_default=False, autocompletion=yaml_files,
        help="the run's YAML file, or `demo`: the embedded models",
    ),
]  # fmt: skip
RunArg = Annotated[Path, typer.Argument(parser=path, help="a finished run's directory", show_default=False)]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", parser=path, help="run directory  [default: runs/<config's name>]", show_default=False),
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        "--out", parser=path, show_default=False,
        help="directory for the runs and what they give  [default: a folder of runs/]",
    ),
]  # fmt: skip
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", parser=path, envvar="PLUGBRIDGE_DATA", help="directory of task files, or `hub`", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="override one key, such as couple.steps=500; repeatable", show_default=False,
        autocompletion=settings,
    ),
]  # fmt: skip
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars, results only")]
RedoOption = Annotated[
    bool, typer.Option("--redo", help="do again what was done with other settings; it is kept in <out>/old")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
