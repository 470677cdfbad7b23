"""From a YAML file to a checked configuration; what is wrong with it, in one line."""

import difflib
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from plugbridge.config.fields import tables_of
from plugbridge.config.inputs import BRANCHES, SHORTHAND, LargeConfig, TaskConfig
from plugbridge.config.schema import RunConfig
from plugbridge.errors import ConfigError


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(str(part))
        model = next(iter(tables_of(field)), model) if field is not None else model
    return list(model.model_fields)


def first_fault(error: ValidationError, source: str) -> str:
    """The first problem of a configuration in one line: where, what, and what to write instead."""
    problems = error.errors()
    # `task` and `large` may be a string or a table: for a table the string branch's complaint says nothing
    first = next((p for p in problems if p["loc"][-1] != "str"), problems[0])
    # pydantic names the branch of a union too: `TaskConfig`, or the validator behind it
    location = tuple(part for part in first["loc"] if not any(name in str(part) for name in BRANCHES))
    where = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key '{where}'; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{source}: '{where}' is required and not given"
    return f"{source}: {where or 'config'}: {message}" + (
        f" (found {first['input']!r})" if not isinstance(first["input"], dict) else ""
    )


def parse_config(raw: Any, source: str) -> RunConfig:
    """Check a configuration. Raises ConfigError with one line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected keys and values, found {type(raw).__name__}")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(first_fault(error, source)) from error


def read_yaml(path: Path, what: str) -> Any:
    """A YAML file's content. Raises ConfigError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply ``key.sub=value`` overrides, resolve paths against the file's folder.

    Raises ConfigError.
    """
    raw = read_yaml(path, "config")
    for override in overrides:
        raw = apply_override(raw, override)
    config = parse_config(raw, str(path))
    return resolve_paths(config, path.resolve().parent)


def apply_override(raw: Any, override: str) -> Any:
    """Set one value: ``couple.steps=500``. Raises ConfigError for a malformed override."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, such as couple.steps=500")
    target: dict[str, Any] = dict(cast(dict[str, Any], raw)) if isinstance(raw, dict) else {}
    root = target
    *path, last = key.strip().split(".")
    for part in path:
        inner: Any = target.get(part)
        if isinstance(inner, dict):
            inner = dict(cast(dict[str, Any], inner))  # another place of the file may hold it too, by a YAML alias
        else:
            inner = {SHORTHAND[part]: inner} if part in SHORTHAND and isinstance(inner, str) else {}
        target[part] = inner
        target = inner
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from error
    return root


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Make relative paths absolute that exist beside the config file; hub ids stay as they are."""

    def model(source: str) -> str:
        path = (folder / Path(source).expanduser()).resolve()
        return str(path) if path.exists() or source.startswith((".", "~", "/")) else source

    def file(source: str | None) -> str | None:
        return None if source is None else str((folder / Path(source).expanduser()).resolve())

    task = config.task
    if isinstance(task, TaskConfig):
        changes = {name: file(getattr(task, name)) for name in ("file", "train", "validation", "test")}
        task = task.model_copy(update=changes)
    path = model(config.large_path)
    return config.model_copy(
        update={
            "small": model(config.small),
            "large": config.large.model_copy(update={"path": path}) if isinstance(config.large, LargeConfig) else path,
            "task": task,
            "data": config.data if config.data == "hub" else file(config.data),
        }
    )
