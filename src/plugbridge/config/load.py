"""From a YAML file to a checked configuration; what is wrong with it, in one line."""

import difflib
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from plugbridge.config.document import LONGEST, Plain, parse_yaml
from plugbridge.config.fields import tables_of
from plugbridge.config.inputs import BRANCHES, SHORTHAND, LargeConfig, TaskConfig
from plugbridge.config.schema import RunConfig
from plugbridge.config.strict import members, takes_null, takes_text
from plugbridge.errors import ConfigError, complaint
from plugbridge.parsing import one_line, path_of, read_text, require_characters, resolved, shown

TEXT = "constrained-str"
"""Pydantic's name of the branch that takes a name."""


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(str(part))
        model = next(iter(tables_of(field)), model) if field is not None else model
    return list(model.model_fields)


def _is_meant(branch: Any, found: Any) -> bool:
    if isinstance(found, str):
        return not any(name in str(branch) for name in BRANCHES)
    return branch != TEXT


def first_fault(error: ValidationError, source: str) -> str:
    """The first problem of a configuration in one line: where, what, and what to write instead."""
    problems = error.errors()
    # `task` and `large` may be a string or a table: what the branch complains of that was not meant says nothing
    first = next((p for p in problems if _is_meant(p["loc"][-1], p["input"])), problems[0])
    # pydantic names the branch of a union too: `TaskConfig`, or the validator behind it
    location = tuple(part for part in first["loc"] if not any(name in str(part) for name in (*BRANCHES, TEXT)))
    where = one_line(".".join(str(part) for part in location), 200)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key '{where}'; {hint}"
    message = complaint(first["type"], first["msg"])
    if first["type"] == "missing":
        return f"{source}: '{where}' is required and not given"
    return f"{source}: {where or 'config'}: {message}" + (
        f" (found {shown(first['input'])})" if not isinstance(first["input"], dict) else ""
    )


def parse_config(raw: Any, source: str) -> RunConfig:
    """Check a configuration. Raises ConfigError with one line."""
    if not isinstance(raw, dict):
        empty = raw is None or (isinstance(raw, Plain) and raw.is_null)
        found = "nothing" if empty else f"a {'text' if isinstance(raw, str) else type(raw).__name__}"
        raise ConfigError(f"{source}: expected keys and values, found {found}")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_fault(error, source)) from error


def read_yaml(path: Path, what: str) -> Any:
    """A YAML file's content, as `parse_yaml` has it. Raises ConfigError."""
    return parse_yaml(read_text(path, ConfigError, what, most=4 * LONGEST), str(path))


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve paths against the file's folder.

    Raises ConfigError.
    """
    raw = read_yaml(path, "config")
    for override in overrides:
        raw = apply_override(raw, override)
    config = parse_config(raw, str(path))
    return resolve_paths(config, resolved(path).parent)


def apply_override(raw: Any, override: str) -> Any:
    """Set one value: ``couple.steps=500``. Raises ConfigError for a malformed override.

    A text is what stands behind the equals sign, letter by letter and blank by blank, or what is in its quotes; the
    value of any other key is YAML.
    """
    key, equals, text = override.partition("=")
    source = f"--set {shown(override)}"
    path, kinds = _place(key.strip())
    if not equals or not all(path):
        raise ConfigError(f"{source}: expected key=value, such as couple.steps=500")
    require_characters(override, "--set", ConfigError)
    return _set(raw, path, _overriding(text, kinds, source))


def set_value(raw: Any, key: str, value: Any) -> Any:
    """Set the value of one dotted key; what `raw` was stays as it is."""
    return _set(raw, _place(key)[0], value)


def _set(raw: Any, path: list[str], value: Any) -> Any:
    target: dict[str, Any] = dict(cast(dict[str, Any], raw)) if isinstance(raw, dict) else {}
    root = target
    *heads, last = path
    for part in heads:
        inner: Any = target.get(part)
        if isinstance(inner, dict):
            inner = dict(cast(dict[str, Any], inner))  # another place of the file may hold it too, by a YAML alias
        else:
            inner = {SHORTHAND[part]: inner} if part in SHORTHAND and isinstance(inner, str) else {}
        target[part] = inner
        target = inner
    target[last] = value
    return root


def _place(key: str) -> tuple[list[str], list[Any]]:
    """A dotted key's parts, and of which types its value may be: none for a key that the schema does not have."""
    parts = key.split(".")
    kinds: list[Any] = [RunConfig]
    for number, part in enumerate(parts):
        mapping = next((kind for kind in kinds if get_origin(kind) is dict), None)
        if mapping is not None:  # the rest is one key of the user's own, which may have dots
            return [*parts[:number], ".".join(parts[number:])], members(get_args(mapping)[1])
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        field = next((table.model_fields[part] for table in tables if part in table.model_fields), None)
        if field is None:
            return parts, []
        kinds = members(field.annotation)
    return parts, kinds


def _overriding(text: str, kinds: list[Any], source: str) -> Any:
    """The value that is written behind ``key=``."""
    stripped = text.strip()
    if str not in kinds:
        value = parse_yaml(text, source)
        return str(value) if isinstance(value, Plain) and takes_text(kinds) and not value.is_null else value
    if takes_null(kinds) and Plain(stripped).is_null:
        return None
    if stripped.startswith("{") and any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
        return parse_yaml(text, source)
    if stripped[:1] in ("'", '"'):
        try:
            quoted = parse_yaml(text, source)
        except ConfigError:
            return text  # a text that only begins with a quote
        if isinstance(quoted, str):
            return quoted
    return text


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Make relative paths absolute that exist beside the config file; hub ids stay as they are. Raises ConfigError."""

    def absolute(key: str, source: str) -> Path:
        path = folder / path_of(source, key, ConfigError)
        return resolved(path_of(str(path), key, ConfigError))

    def model(key: str, source: str) -> str:
        path = absolute(key, source)
        return str(path) if path.exists() or source.startswith((".", "~", "/")) else source

    def file(key: str, source: str | None) -> str | None:
        return None if source is None else str(absolute(key, source))

    task = config.task
    if isinstance(task, TaskConfig):
        names = ("file", "train", "validation", "test")
        task = task.model_copy(update={name: file(f"task.{name}", getattr(task, name)) for name in names})
    path = model("large", config.large_path)
    return config.model_copy(
        update={
            "small": model("small", config.small),
            "large": config.large.model_copy(update={"path": path}) if isinstance(config.large, LargeConfig) else path,
            "task": task,
            "data": config.data if config.data == "hub" else file("data", config.data),
        }
    )
