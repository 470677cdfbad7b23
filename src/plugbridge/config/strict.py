"""What every table of the schema is: frozen, without unknown keys, every value of the type that its key says."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plugbridge.config.document import Plain

# What no machine has room or time for is a slip of the keyboard, and is refused before anything hangs on it.
STEPS = 10_000_000
ROWS = 10_000_000
BATCH = 65_536
WIDTH = 65_536
Name = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path, an id or a name: no longer than a path may be."""


class StrictConfig(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, raw: Any) -> Any:
        """Texts take scalars without quotes as they were written, other keys what YAML 1.2 reads in them."""
        if not isinstance(raw, dict):
            return raw.value if isinstance(raw, Plain) else raw
        fields = cls.model_fields
        return {
            key: typed(value, fields[key].annotation) if key in fields else value
            for key, value in cast(dict[Any, Any], raw).items()
        }


def typed(value: Any, annotation: Any) -> Any:
    """A value with its scalars without quotes resolved for the type of its key; tables see to their own."""
    kinds = members(annotation)
    if isinstance(value, Plain):
        if Any in kinds:
            return value
        return value.value if value.is_null or not takes_text(kinds) else str(value)
    for kind in kinds:
        origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(value, list) and origin in (list, tuple):
            return [typed(item, arguments[0]) for item in cast(list[Any], value)]
        if isinstance(value, dict) and origin is dict:
            return {key: typed(item, arguments[1]) for key, item in cast(dict[Any, Any], value).items()}
    return value


def members(annotation: Any) -> list[Any]:
    """The types of which a value may be, those of a union one by one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in members(part)]
    return [annotation]


def takes_text(kinds: list[Any]) -> bool:
    """Whether a value of these types may be a text: any, or one of some."""
    return any(kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds)


def takes_null(kinds: list[Any]) -> bool:
    """Whether a value of these types may be null."""
    return NoneType in kinds
