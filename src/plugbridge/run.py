"""A run directory: stages, digests, done-markers written last, resume. Knows no model.

Each stage has a folder. ``started.json`` holds the digest of everything the stage depends on:
its settings, its input files, and the digests of the stages it needs. ``done.json`` is written last.
A stage whose marker carries today's digest is skipped; a folder with another digest is cleared;
a started one with today's digest goes on from what is there.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plugbridge.errors import RunError
from plugbridge.files import digest_of, disk_errors, write_json

log = logging.getLogger(__name__)

FORMAT = 1
DONE = "done.json"
STARTED = "started.json"


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


def read_marker(folder: Path) -> dict[str, Any] | None:
    """A stage's done-marker, or None if it is absent or unreadable."""
    return _read(folder / DONE)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_done(folder: Path, digest: str) -> bool:
    """Whether a stage is finished for this digest, with all its files in place."""
    marker = read_marker(folder)
    if marker is None or marker.get("digest") != digest:
        return False
    outputs: dict[str, int] = marker["outputs"]
    for name, size in outputs.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            log.warning("%s has changed since it was written; its stage runs again", path)
            return False
    return True


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Hold the run directory for this process. Raises RunError if another holds it."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is working in {root}; wait for it or choose another --out") from error
        yield
    finally:
        os.close(descriptor)


def check_root(root: Path) -> None:
    """Refuse a directory that holds something other than a run. Raises RunError."""
    if root.exists() and not root.is_dir():
        raise RunError(f"{root} is a file; --out must name a run directory")
    above = next((parent for parent in root.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise RunError(f"{above} is a file; --out must name a run directory")
    if root.is_dir():
        visible = [p for p in root.iterdir() if not p.name.startswith(".")]
        if visible and not (root / "config.yaml").is_file():
            raise RunError(f"{root} is not empty and not a run; choose another --out")


def check_needs(root: Path, stages: Sequence[Stage], only: str | None) -> None:
    """Refuse a stage by itself whose needs are not done with today's settings. Raises RunError."""
    if only is None:
        return
    digests = stage_digests(stages)
    chosen = next((stage for stage in stages if stage.name == only), None)
    if chosen is None:
        raise RunError(f"this run has no stage '{only}': its config has no `{only}:` section")
    for need in chosen.needs:
        if not is_done(root / need, digests[need]):
            raise RunError(
                f"stage '{only}' needs '{need}', which is not done with these settings; "
                f"run `plugbridge {need}` first, or `plugbridge run` for all"
            )


def check_room(root: Path, stages: Sequence[Stage], only: str | None) -> None:
    """Refuse to begin where a stage that is to run will not have the disk it needs. Raises RunError."""
    digests = stage_digests(stages)
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    for stage in stages:
        folder = root / stage.name
        if only not in (None, stage.name) or is_done(folder, digests[stage.name]):
            continue
        need = stage.room()
        have = free + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # which it replaces
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
) -> None:
    """Run all stages that are not done, or only one of them. The caller holds the lock.

    `announce(stage, what)` is told ``skipped`` or ``running``; `do` does a stage's work, here or elsewhere. Raises
    RunError when `only` needs a stage that is not done with today's settings, or a stage would run out of disk.
    """
    check_needs(root, stages, only)
    check_room(root, stages, only)
    digests = stage_digests(stages)
    for stage in stages:
        folder = root / stage.name
        digest = digests[stage.name]
        if only is not None and stage.name != only:
            continue
        if is_done(folder, digest):
            announce(stage.name, "skipped")
            continue
        announce(stage.name, "running")
        _run_stage(folder, stage, digest, {name: digests[name] for name in stage.needs}, do)


def borrow(root: Path, donors: Sequence[Path], stages: Sequence[Stage]) -> None:
    """Copy finished stages with today's digests from other runs, instead of doing them again.

    The caller holds the lock of `root`.
    """
    digests = stage_digests(stages)
    for stage in stages:
        folder, digest = root / stage.name, digests[stage.name]
        if is_done(folder, digest):
            continue
        donor = next((d / stage.name for d in donors if is_done(d / stage.name, digest)), None)
        if donor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            with disk_errors(folder):
                shutil.copytree(donor, folder, ignore=shutil.ignore_patterns(DONE))
                shutil.copyfile(donor / DONE, folder / DONE)


def _run_stage(folder: Path, stage: Stage, digest: str, needs: Mapping[str, str], do: Do) -> None:
    started = _read(folder / STARTED)
    if folder.exists() and (started is None or started.get("digest") != digest):
        shutil.rmtree(folder)
    (folder / DONE).unlink(missing_ok=True)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {"digest": digest, "depends": dict(stage.depends)})
    with disk_errors(folder):
        result = do(stage.name, partial(stage.work, folder))
    outputs = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (DONE, STARTED) and not path.name.startswith(".")
    }
    write_json(
        folder / DONE,
        {
            "stage": stage.name,
            "digest": digest,
            "needs": needs,
            "depends": dict(stage.depends),
            "outputs": outputs,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "reserved_bytes": result.reserved_bytes,
            "facts": result.facts,
        },
    )


def facts_of(root: Path, stage: str) -> dict[str, Any]:
    """Facts a finished stage left. Raises RunError if it is not finished."""
    marker = read_marker(root / stage)
    if marker is None:
        raise RunError(f"stage '{stage}' of {root} is not done; run `plugbridge {stage}` first")
    facts: dict[str, Any] = marker["facts"]
    return facts
