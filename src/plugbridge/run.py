"""A run directory: stages, digests, resume, and what is kept of other settings. Knows no model.

Each stage has a folder. A stage whose markers carry today's digest is skipped; a started one goes on from what is
there; one that was done with other settings is work, and is only set aside, into ``old/``, by whoever says so.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from plugbridge.errors import RunError
from plugbridge.files import digest_of, disk_errors, folder_atomically
from plugbridge.markers import (
    CHECKPOINTS,
    DONE,
    FORMAT,
    OLD,
    STARTED,
    State,
    changed_output,
    changes,
    check_root,
    is_done,
    mark_run,
    outputs_of,
    read_marker,
    read_started,
    reading,
    state_of,
    write_marker,
)
from plugbridge.version import versions

log = logging.getLogger(__name__)

MOST = 6
"""Changed settings that a message names."""


@dataclass(frozen=True)
class StageResult:
    """What a stage returns: JSON facts for reports, and what it cost."""

    facts: dict[str, Any]
    seconds: float
    peak_bytes: int
    reserved_bytes: int = 0


@dataclass(frozen=True)
class Stage:
    """One step of a run: a name, the stages it reads, what it depends on, and the work itself."""

    name: str
    needs: tuple[str, ...]
    depends: Mapping[str, Any]
    work: Callable[[Path], StageResult]
    room: Callable[[], int] = lambda: 0
    """Bytes of disk that the work fills while it lasts, as far as that is known before."""


def stage_digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Digest of every stage: its own dependencies and those of all stages it needs."""
    digests: dict[str, str] = {}
    for stage in stages:
        digests[stage.name] = digest_of(
            {
                "format": FORMAT,
                "stage": stage.name,
                "depends": stage.depends,
                "needs": {name: digests[name] for name in stage.needs},
            }
        )
    return digests


@contextmanager
def locked(root: Path, config: Path | None = None, redo: bool | None = False) -> Generator[None]:
    """Hold the run directory for this process, and make it a run, begun by a `config` file.

    Raises RunError if another holds it, or if it is no run of the file (see `check_root`).
    """
    with disk_errors(root, strict=True):
        if not root.is_dir():
            check_root(root)
        root.mkdir(parents=True, exist_ok=True)
    with disk_errors(root / ".lock", strict=True):
        descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with disk_errors(root / ".lock", strict=True):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"another process is working in {root}; wait for it or choose another --out") from error
        mark_run(root, config, redo)
        yield
    finally:
        os.close(descriptor)


def check_stages(root: Path, stages: Sequence[Stage], only: str | None, redo: bool = False) -> None:
    """Refuse to begin where a stage lacks what it needs or the disk it fills, or is done with other settings.

    Raises RunError; with `redo`, what was done with other settings will be set aside.
    """
    check_needs(root, stages, only)
    check_kept(root, stages, only, redo)
    check_room(root, stages, only)


def check_needs(root: Path, stages: Sequence[Stage], only: str | None) -> None:
    """Refuse a stage by itself whose needs are not done with today's settings. Raises RunError."""
    if only is None:
        return
    digests = stage_digests(stages)
    known = {stage.name: stage for stage in stages}
    if only not in known:
        raise RunError(f"this run has no stage '{only}': its config has no `{only}:` section")
    for need in known[only].needs:
        if is_done(root / need, digests[need]):
            continue
        marker = read_marker(root / need) or read_started(root / need)
        if marker is None or marker["digest"] == digests[need]:
            raise RunError(
                f"stage '{only}' needs '{need}', which is not done; run `plugbridge {need}` first, or "
                "`plugbridge run` for all"
            )
        raise RunError(
            f"stage '{only}' needs '{need}', which was done with other settings: "
            f"{_why(root, stages, _and_needed(known, need))}; give the same settings, or run "
            f"`plugbridge {need} --redo` first"
        )


def _and_needed(known: Mapping[str, Stage], name: str) -> list[Stage]:
    """A stage and all that it needs, in their order."""
    found, waiting = {name}, [name]
    while waiting:
        new = set(known[waiting.pop()].needs) - found
        found |= new
        waiting += sorted(new)
    return [stage for stage in known.values() if stage.name in found]


def check_kept(root: Path, stages: Sequence[Stage], only: str | None, redo: bool) -> None:
    """Refuse to do again what was done with other settings or inputs, and say which. Raises RunError."""
    other = other_stages(root, stages, only)
    if other and not redo:
        refuse_others(root, stages, other)


def other_stages(root: Path, stages: Sequence[Stage], only: str | None) -> list[Stage]:
    """The stages that were done with other settings or inputs, and of whose today's nothing was set aside."""
    digests, states = stage_digests(stages), _states(root, stages, only, whole=False)
    return [
        stage
        for stage in stages
        if states.get(stage.name) == "other" and _kept(root, stage.name, digests[stage.name]) is None
    ]


def refuse_others(root: Path, stages: Sequence[Stage], other: Sequence[Stage]) -> NoReturn:
    """Raise RunError for stages that would be done again, with what has changed."""
    names = ", ".join(stage.name for stage in other)
    raise RunError(
        f"{root} holds other work, which would be done again ({names}): {_why(root, stages, other)}; give the same "
        f"settings, a directory of its own with --out, or --redo, which first moves those stages to {root / OLD}"
    )


def _why(root: Path, stages: Sequence[Stage], changed: Sequence[Stage]) -> str:
    """What made these stages others than they were: their settings and inputs, then and now."""
    found: dict[str, None] = {}
    for stage in changed:
        marker = read_started(root / stage.name) or read_marker(root / stage.name)
        if marker is not None:
            found.update(dict.fromkeys(changes(marker["depends"], {**stage.depends})))
    if not found:  # nothing but what they need, or the way it is done
        needs = sorted({need for stage in changed for need in stage.needs})
        return f"{', '.join(needs)} changed" if needs else "another version of plugbridge did it"
    more = len(found) - MOST
    return ", ".join([*list(found)[:MOST], *([f"and {more} more"] if more > 0 else [])])


def _states(root: Path, stages: Sequence[Stage], only: str | None, whole: bool = True) -> dict[str, State]:
    """What the folder of every stage to run is today; outputs are compared where that is of the `whole`."""
    digests = stage_digests(stages)
    return {name: state_of(root / name, digest, whole) for name, digest in digests.items() if only in (None, name)}


def check_room(root: Path, stages: Sequence[Stage], only: str | None) -> None:
    """Refuse to begin where a stage that is to run will not have the disk it needs. Raises RunError."""
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    states = _states(root, stages, only)
    for stage in stages:
        state = states.get(stage.name, "done")
        if state == "done":
            continue
        need, have = stage.room(), free
        if state == "started":  # what it replaces
            have += sum(path.stat().st_size for path in (root / stage.name).rglob("*") if path.is_file())
        if need > have:
            raise RunError(
                f"stage '{stage.name}' will write {need / 1e6:.1f} MB to {root}, where {have / 1e6:.1f} MB are free; "
                "free some disk, choose another --out, or have less there: score.keep, couple.cache, a smaller Bridge, "
                "checkpoint_every"
            )


Do = Callable[[str, Callable[[], StageResult]], StageResult]
"""What does the work of the stage that it is told."""


def execute(
    root: Path,
    stages: Sequence[Stage],
    only: str | None,
    announce: Callable[[str, str], None],
    do: Do = lambda _stage, work: work(),
    redo: bool = False,
    ended: Callable[[str], None] = lambda _stage: None,
) -> None:
    """Run all stages that are not done, or only one of them. The caller holds the lock.

    `announce(stage, what)` is told ``skipped`` or ``running``, `ended(stage)` that it is done; `do` does a stage's
    work, here or elsewhere. Raises RunError when `only` needs a stage that is not done with today's settings, a stage
    would run out of disk, or one that was done with other settings would be done again: with `redo` it is set aside
    first.
    """
    check_stages(root, stages, only, redo)
    digests = stage_digests(stages)
    _make_way(root, _states(root, stages, only), digests)
    for stage in stages:
        folder, digest = root / stage.name, digests[stage.name]
        if only is not None and stage.name != only:
            continue
        if is_done(folder, digest):
            announce(stage.name, "skipped")
            _drop_checkpoints(folder)  # of a process that was killed before it could
            continue
        announce(stage.name, "running")
        _run_stage(folder, stage, digest, {name: digests[name] for name in stage.needs}, do)
        ended(stage.name)


def _make_way(root: Path, states: Mapping[str, State], digests: Mapping[str, str]) -> None:
    """Set aside what is of other settings or damaged, and take back what was set aside with today's."""
    attempt: Path | None = None
    for name, state in states.items():
        folder = root / name
        before = _kept(root, name, digests[name]) if state != "done" else None
        if state == "damaged" and (marker := read_marker(folder)) is not None:
            log.warning("%s has changed since it was written; its stage runs again", changed_output(folder, marker))
        with disk_errors(folder, strict=True):
            if state in ("other", "damaged") or (before is not None and folder.exists()):
                attempt = attempt or _next_attempt(root)
                attempt.mkdir(parents=True, exist_ok=True)
                folder.rename(attempt / name)
                log.info("what was in %s is kept in %s", folder, attempt / name)
            if before is not None:
                before.rename(folder)
                log.info("%s was done with these settings before, and is back from %s", folder, before)


def _next_attempt(root: Path) -> Path:
    """A folder that is not there yet for what is set aside."""
    old = root / OLD
    if not old.is_dir() and (old.exists() or old.is_symlink()):
        raise RunError(f"{old} is no directory, where what is set aside belongs; move it away")
    numbers = [int(path.name) for path in old.iterdir() if path.name.isdecimal()] if old.is_dir() else []
    return old / str(max(numbers, default=0) + 1)


def _kept(root: Path, name: str, digest: str) -> Path | None:
    """A finished stage with this digest among those that were set aside."""
    with reading(root / OLD, "move it away"):
        found = [path for path in (root / OLD).glob(f"*/{name}") if is_done(path, digest)]
    return found[0] if found else None


def borrow(root: Path, donors: Sequence[Path], stages: Sequence[Stage]) -> None:
    """Copy finished stages with today's digests from other runs, instead of doing them again.

    The caller holds the lock of `root`. What is there of other settings is set aside.
    """
    digests, states = stage_digests(stages), _states(root, stages, None)
    for name, digest in digests.items():
        if states[name] == "done" or _kept(root, name, digest) is not None:
            continue
        donor = next((d / name for d in donors if is_done(d / name, digest)), None)
        if donor is None:
            continue
        if states[name] != "started":  # of these settings, and less than what the donor has
            _make_way(root, {name: states[name]}, digests)
        with folder_atomically(root / name) as folder:
            shutil.copytree(donor, folder, dirs_exist_ok=True)


def _run_stage(folder: Path, stage: Stage, digest: str, needs: Mapping[str, str], do: Do) -> None:
    with disk_errors(folder / DONE, strict=True):
        (folder / DONE).unlink(missing_ok=True)
    with disk_errors(folder, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
    begun = {"stage": stage.name, "digest": digest, "needs": dict(needs), "depends": dict(stage.depends)}
    write_marker(folder / STARTED, {**begun, "versions": versions()})
    with disk_errors(folder):
        result = do(stage.name, partial(stage.work, folder))
    with disk_errors(folder):
        outputs = outputs_of(folder)
    done = {
        "versions": versions(),
        "outputs": outputs,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "reserved_bytes": result.reserved_bytes,
        "facts": result.facts,
    }
    write_marker(folder / DONE, {**begun, **done})
    _drop_checkpoints(folder)


def _drop_checkpoints(folder: Path) -> None:
    """Of a stage that is done; until it is, whatever ends the process, no step is done again."""
    for name in CHECKPOINTS:
        with disk_errors(folder / name, strict=True):
            (folder / name).unlink(missing_ok=True)


def facts_of(root: Path, stage: str) -> dict[str, Any]:
    """Facts a finished stage left. Raises RunError if it is not finished."""
    marker = read_marker(root / stage)
    if marker is None:
        raise RunError(f"stage '{stage}' of {root} is not done; run `plugbridge {stage}` first")
    facts: dict[str, Any] = marker["facts"]
    return facts
