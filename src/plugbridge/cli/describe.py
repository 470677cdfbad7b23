"""What there is to choose from: `plugbridge families`, `tasks`, `methods` and `explain`."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from plugbridge.cli.options import JsonOption
from plugbridge.cli.terminal import out, print_rows
from plugbridge.config import fields_help, fields_markdown


def families(as_json: JsonOption = False) -> None:
    """List the model families."""
    from plugbridge.families.spec import family_names, load_family

    rows = [
        {
            "name": family.name,
            "model_type": family.model_type,
            "architecture": family.architecture,
            "kind": family.kind,
            "axes": dict(family.scope),
        }
        for family in map(load_family, family_names())
    ]
    print_rows(rows, ("name", "architecture", "kind"), as_json)


def tasks(
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print prompts and metrics as Markdown")] = False,
) -> None:
    """List the tasks."""
    from plugbridge.tasks.describe import describe, tasks_markdown
    from plugbridge.tasks.spec import load_task, task_names

    found = list(map(load_task, task_names()))
    if markdown:
        sys.stdout.write(tasks_markdown(found))
        return
    print_rows([describe(task) for task in found], ("name", "title", "shipped", "licence"), as_json)


def methods(as_json: JsonOption = False) -> None:
    """List the parameter-efficient methods."""
    from plugbridge.tuners.table import METHODS, describe

    print_rows([describe(method) for method in METHODS.values()], ("name", "title", "library", "source"), as_json)


def explain(
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
) -> None:
    """Explain every key of a run's YAML file."""
    if markdown:
        sys.stdout.write(fields_markdown())
        return
    table = Table()
    for column in ("key", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, default, text in fields_help():
        table.add_row(key, default, text)
    out.print(table)
