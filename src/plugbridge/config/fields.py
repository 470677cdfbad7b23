"""Every key of the schema with its default and meaning, for `plugbridge explain` and docs/configuration.md."""

from typing import Any, get_args

from pydantic import BaseModel

from plugbridge.config.schema import RunConfig


def fields_help() -> list[tuple[str, str, str]]:
    """(key, default, description) of every configuration field, in the schema's order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if field.description:
            rows.append((name, _default(field), field.description))
        for model in inner:
            for key, sub in model.model_fields.items():
                rows.append((f"{name}.{key}", _default(sub), sub.description or ""))
    return rows


def fields_markdown() -> str:
    """`fields_help` as a Markdown table."""
    lines = [f"| `{key}` | {default} | {text} |" for key, default, text in fields_help()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *lines]) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else str(field.default)
