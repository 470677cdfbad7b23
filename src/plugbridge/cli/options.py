"""Arguments and options that several commands share."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from plugbridge.cli.completion import settings
from plugbridge.errors import ConfigError
from plugbridge.parsing import path_of

MOST = 1024
"""Threads of a process, and processes at a time, that can be asked for."""


def path_in(name: str) -> Callable[[str], Path]:
    """What reads a path on the command line, `~` expanded: shells leave it in `--out=~/run`.

    Raises ConfigError that begins with the argument's or option's `name`.
    """

    def path(text: str) -> Path:  # whose name stands in the help
        if not text.strip():
            raise ConfigError(f"{name}: an empty path names nothing; give one, such as . for this directory")
        return path_of(text, name, ConfigError)

    return path


def model_in(name: str) -> Callable[[str], str]:
    """What reads a model on the command line, a hub id or a directory, as `path_in` reads paths."""

    def model(text: str) -> str:
        path = path_in(name)(text)
        return str(path) if text.startswith("~") else text

    return model


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
        parser=path_in("config"), show_default=False, autocompletion=yaml_files,
        help="the run's YAML file, or `demo`: the embedded models",
    ),
]  # fmt: skip
RunArg = Annotated[Path, typer.Argument(parser=path_in("root"), help="a finished run's directory", show_default=False)]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", parser=path_in("--out"), help="run directory  [default: runs/<config's name>]", show_default=False
    ),
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        "--out", parser=path_in("--out"), show_default=False,
        help="directory for the runs and what they give  [default: a folder of runs/]",
    ),
]  # fmt: skip
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=path_in("--data, or PLUGBRIDGE_DATA"),
        envvar="PLUGBRIDGE_DATA",
        help="directory of task files, or `hub`",
        show_default=False,
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
