"""Whether a run that is there is of the settings that are asked for, as far as files tell: before torch is imported."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from plugbridge.config import RunConfig
from plugbridge.devices import surely_no_card
from plugbridge.digests import file_digest
from plugbridge.folders import drops_out, model_digest
from plugbridge.markers import OLD, read_marker, read_started
from plugbridge.preflight import Checked, most_of
from plugbridge.run import Stage, StageResult, check_needs, other_stages, refuse_others
from plugbridge.sources import read_model_config
from plugbridge.stages.depends import UNTOLD, Asked, Part, Untold, parts_of

HASHED = 2**26
"""Bytes of a file from which its digest is not made before torch is imported: it would take as long."""


def check_recorded(root: Path, checked: Checked, only: str | None, redo: bool) -> None:
    """Refuse a run whose stages were done with other settings, as `check_stages` will, as far as files tell.

    Nothing is refused here that would not be refused there: what is untold is taken to be what it was. Raises RunError.
    """
    parts = parts_told(checked, only)
    if not _agree(root, parts):
        return  # of two devices or tokenizers: who knows which it is today
    stages = stages_as_recorded(root, parts)
    check_needs(root, stages, only)
    other = [] if redo else other_stages(root, stages, only)
    back = {part.name for part in parts if _may_be_back(root, part)}
    if any(stage.name not in back for stage in other):
        refuse_others(root, stages, other)


def parts_told(checked: Checked, only: str | None) -> list[Part]:
    """The stages that are asked for, with as much of what they depend on as files tell."""
    return parts_of(_asked(checked), only)


def stages_as_recorded(root: Path, parts: Sequence[Part]) -> list[Stage]:
    """The same, where what is untold is as each stage has recorded it."""
    return [
        Stage(part.name, part.needs, _as_recorded(part.depends, _recorded(root / part.name) or {}), _nothing)
        for part in parts
    ]


def _asked(checked: Checked) -> Asked:
    config = checked.config
    spec = checked.task.model_dump(mode="json")
    task = {
        "spec": spec, "files": dict(checked.digests), **most_of(config),
        "front": UNTOLD, "end_mark": UNTOLD, "cut": UNTOLD,
    }  # fmt: skip
    inputs = {"small": _digest_told(config, config.small), "large": _digest_told(config, config.large_path)}
    return Asked(config, checked.method, checked.settings, _device_told(config), {**inputs, "task": task}, _drops_told)


def _digest_told(config: RunConfig, source: str) -> dict[str, Any]:
    return model_digest(
        source, config.trust_remote_code, lambda path: UNTOLD if path.stat().st_size > HASHED else file_digest(path)
    )


def _device_told(config: RunConfig) -> str | Untold:
    if config.device != "auto":
        return config.device
    return "cpu" if surely_no_card() else UNTOLD


def _drops_told(source: str) -> bool | Untold:
    return drops_out(read_model_config(source)) or UNTOLD


def _nothing(_folder: Path) -> StageResult:
    raise AssertionError("a stage that is only compared")


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What a stage's folder says that it depended on."""
    marker = read_started(folder) or read_marker(folder)
    return None if marker is None else marker["depends"]


def _as_recorded(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Today's dependencies with what is untold as it was, or left out where it was not."""
    found: dict[str, Any] = {}
    for key, value in now.items():
        if isinstance(value, dict):
            before = then.get(key)
            found[key] = _as_recorded(
                cast(dict[str, Any], value), cast(dict[str, Any], before) if isinstance(before, dict) else {}
            )
        elif not isinstance(value, Untold):
            found[key] = value
        elif key in then:
            found[key] = then[key]
    return found


def _agree(root: Path, parts: Sequence[Part]) -> bool:
    """Whether all stages have recorded the same of what is untold and common to them."""
    said: dict[str, list[Any]] = {}
    for part in parts:
        if (then := _recorded(root / part.name)) is not None:
            for path in _untold(part.depends):
                if path != "micro_batch":  # each stage's own
                    said.setdefault(path, []).append(_at(then, path))
    return all(value == values[0] for values in said.values() for value in values)


def _untold(depends: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in depends.items():
        if isinstance(value, Untold):
            yield f"{before}{key}"
        elif isinstance(value, dict):
            yield from _untold(cast(dict[str, Any], value), f"{before}{key}\0")


def _at(then: Mapping[str, Any], path: str) -> Any:
    value: Any = then
    for key in path.split("\0"):
        value = cast(dict[str, Any], value).get(key) if isinstance(value, dict) else None
    return value


def _may_be_back(root: Path, part: Part) -> bool:
    """Whether a stage that was set aside may be of today's settings: it would be back, and nothing refused."""
    try:
        aside = [_recorded(folder) for folder in (root / OLD).glob(f"*/{part.name}")]
    except OSError:
        return True
    return any(then is not None and _as_recorded(part.depends, then) == then for then in aside)
