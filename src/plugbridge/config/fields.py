"""Every key of the schema with its default and meaning, for `plugbridge explain` and docs/configuration.md."""

from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from plugbridge.config.schema import RunConfig


def tables_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The tables that a key may hold."""
    options = [field.annotation, *get_args(field.annotation)]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def fields_help() -> list[tuple[str, str, str]]:
    """(key, default, description) of every configuration field, in the schema's order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        if field.description:
            rows.append((name, _default(field), field.description))
        for model in tables_of(field):
            for key, sub in model.model_fields.items():
                rows.append((f"{name}.{key}", _default(sub), sub.description or ""))
    return rows


def fields_markdown() -> str:
    """`fields_help` as a Markdown table."""
    lines = [f"| `{key}` | {default} | {text} |" for key, default, text in fields_help()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *lines]) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else str(field.default)
