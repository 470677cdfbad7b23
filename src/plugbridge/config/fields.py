"""Every key of the schema with its default and meaning, for `plugbridge explain` and docs/configuration.md."""

import re
from typing import Any, Literal, get_args, get_origin

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
            rows.append((name, _default(field), _meaning(field)))
        for model in tables_of(field):
            for key, sub in model.model_fields.items():
                rows.append((f"{name}.{key}", _default(sub), _meaning(sub)))
    return rows


def field_values(key: str) -> list[str]:
    """What a key may be set to, where the schema lists it; a truth value's two words."""
    name, _, inner = key.partition(".")
    field = RunConfig.model_fields.get(name)
    if field is not None and inner:
        field = next((model.model_fields[inner] for model in tables_of(field) if inner in model.model_fields), None)
    if field is None:
        return []
    return ["true", "false"] if field.annotation is bool else _values(field.annotation)


def fields_markdown() -> str:
    """`fields_help` as a Markdown table."""
    lines = [f"| `{key}` | {default} | {text} |" for key, default, text in fields_help()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *lines]) + "\n"


def _meaning(field: FieldInfo) -> str:
    """The description, and the values to choose from where it does not name them all."""
    said, values = field.description or "", _values(field.annotation)
    if all(re.search(rf"\b{re.escape(value)}\b", said) for value in values):
        return said
    several = any(get_origin(part) is list for part in get_args(field.annotation))
    return f"{said}; {'some' if several else 'one'} of {', '.join(f'`{value}`' for value in values)}"


def _values(annotation: Any) -> list[str]:
    """The strings that a type lets one choose from."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [value for part in get_args(annotation) for value in _values(part)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else str(field.default)
