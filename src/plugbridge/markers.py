"""What a run directory says of itself, read and written in one place.

``run.json`` makes a directory a run: it is the first file in it, and nothing else is taken for one. In a stage's
folder ``started.json`` holds the digest of everything that the stage depends on, and ``done.json``, written last,
the digests of what it left. Each ends with a seal over the rest: a marker that was changed is no marker.
"""

import json
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from plugbridge.digests import file_digest
from plugbridge.errors import PlugbridgeError, RunError
from plugbridge.files import check_folder, digest_of, disk_errors, write_json, write_text
from plugbridge.parsing import one_line, read_json, resolved
from plugbridge.version import __version__

RUN = "run.json"
STARTED = "started.json"
DONE = "done.json"
CHECKPOINT = "checkpoint.pt"
EVALUATED = "checkpoint.json"
CHECKPOINTS = (CHECKPOINT, EVALUATED)
"""What a stage that is not done goes on from: a training, a search. They go when ``done.json`` is there."""
OLD = "old"
"""Folder of a run for stages that were done with other settings: ``old/1/couple``."""
FORMAT = 2
"""Of run directories: part of every digest."""
_MARK = "plugbridge run"
_PARTS: dict[str, tuple[type, ...]] = {"digest": (str,), "depends": (dict,)}
_DONE_PARTS: dict[str, tuple[type, ...]] = {
    **_PARTS, "needs": (dict,), "outputs": (dict,), "seconds": (int, float), "peak_bytes": (int,), "facts": (dict,),
}  # fmt: skip

State = Literal["absent", "started", "done", "damaged", "other"]
"""Of a stage's folder: ``other`` is of other settings or inputs; ``damaged`` is done, but a file has changed since."""


@contextmanager
def reading(path: Path, remedy: str = "move its stage's folder away and run again") -> Generator[Path]:
    """Turn whatever goes wrong in reading something of a run directory into one clear error."""
    try:
        yield path
    except PlugbridgeError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(f"{path} cannot be read, it is damaged or of another version ({found}); {remedy}") from error


def read_marker(folder: Path) -> dict[str, Any] | None:
    """A stage's done-marker, or None if it is absent or not as it was written."""
    return read_sealed(folder / DONE, _DONE_PARTS)


def read_started(folder: Path) -> dict[str, Any] | None:
    """A stage's start-marker, or None if it is absent or not as it was written."""
    return read_sealed(folder / STARTED, _PARTS)


def write_marker(path: Path, value: Mapping[str, Any]) -> None:
    """Write a marker with its seal."""
    write_json(path, {**value, "seal": digest_of(dict(value))})


def read_sealed(path: Path, parts: Mapping[str, tuple[type, ...]]) -> dict[str, Any] | None:
    """What `write_marker` wrote, with these parts, or None if it is not as it was written.

    Only stages from before there was a ``run.json`` have markers without a seal; what is set aside, in
    ``old/1/<stage>``, is of a run that has one.
    """
    try:
        value = read_json(path, RunError)
        if not isinstance(value, dict):
            return None
        found = cast(dict[str, Any], value)
        seal = found.pop("seal", None)
        home = path.parent.parent
        roots = (home, home.parent.parent) if home.parent.name == OLD else (home,)
        sealed = seal is not None or path.name in (RUN, EVALUATED) or any((root / RUN).exists() for root in roots)
        if sealed and seal != digest_of(found):
            return None
    except (RunError, ValueError):
        return None
    whole = all(type(found.get(name)) in kinds for name, kinds in parts.items())
    return found if whole else None


def outputs_of(folder: Path) -> dict[str, str]:
    """The digest of every file that a stage left, by relative name, without markers, checkpoints and hidden files."""
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in visible_files(folder)
        if path.parent != folder or path.name not in CHECKPOINTS
    }


def visible_files(folder: Path) -> list[Path]:
    """Files of a stage's folder, markers and hidden ones left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (DONE, STARTED) and not path.name.startswith(".")
    ]


def changed_output(folder: Path, marker: Mapping[str, Any]) -> Path | None:
    """The first file that is not what it was when the stage ended."""
    paths = ((folder / name, digest) for name, digest in marker["outputs"].items())
    return next((path for path, digest in paths if not is_as_left(path, digest)), None)


def is_as_left(path: Path, digest: str) -> bool:
    """Whether a file is there with the digest that it had when its stage ended."""
    try:
        return path.is_file() and file_digest(path) == digest
    except (OSError, PlugbridgeError):
        return False


def state_of(folder: Path, digest: str, whole: bool = True) -> State:
    """What a stage's folder is, seen with the digest of today. Raises RunError for one that is not ours.

    Without `whole` nobody looks at its outputs, which may take long: it may be damaged, where it is said to be done.
    """
    if folder.is_symlink() and not folder.exists():
        raise RunError(f"{folder} is a link to nowhere; remove it, or give another --out")
    if not folder.exists():
        return "absent"
    if not folder.is_dir():
        raise RunError(f"{folder} is a file, where a stage's folder belongs; move it away, or give another --out")
    if (folder / DONE).is_dir():
        raise RunError(f"{folder / DONE} is a directory, where a stage's marker belongs; move it away")
    done = read_marker(folder)
    started = read_started(folder) or done
    if done is not None and done["digest"] == digest:
        return "done" if not whole or changed_output(folder, done) is None else "damaged"
    with reading(folder):
        empty = not any(not path.name.startswith(".") for path in folder.iterdir())
    if empty:
        return "absent"
    if started is None:
        raise RunError(
            f"{folder} has no {STARTED} as plugbridge writes it, so it is left alone; "
            "move it away, or give another --out"
        )
    if started["digest"] == digest:
        return "started"
    return "other" if done is not None or visible_files(folder) else "started"


def is_done(folder: Path, digest: str) -> bool:
    """Whether a stage is finished for this digest, with all its files as they were."""
    marker = read_marker(folder)
    return marker is not None and marker["digest"] == digest and changed_output(folder, marker) is None


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two stages' dependencies, each as ``key then → now``."""
    old, new = _flat(then), _flat(now)
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if a != b:
            if key.rpartition(".")[2] == "commit":  # which people look up, unlike digests
                a, b = (value[:COMMIT] if _is_hash(value) else value for value in (a, b))
            hashes = _is_hash(a) and _is_hash(b)
            found.append(_other_content(key) if hashes else f"{key} {_shown(a)} → {_shown(b)}")
    return found


_ABSENT = object()
COMMIT = 12
"""Digits of a commit that are shown."""


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value) is not None


def _other_content(key: str) -> str:
    """Which file has changed, as users know it: by the key of their configuration, or its name."""
    whose, inside, name = key.partition(".files.")
    if inside and whose == "task":
        return f"the rows of task.{name} changed" if name == "file" else f"the task's {name} rows changed"
    return f"{name} of {whose} has other content" if inside else f"{key} has other content"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= _flat(cast(dict[str, Any], inner), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def read_run(root: Path) -> dict[str, Any] | None:
    """The marker that makes a directory a run; None if there is none, or not as we write it."""
    found = read_sealed(root / RUN, {"what": (str,), "format": (int,), "config": (str,), "wrote": (dict,)})
    return found if found is not None and found["what"] == _MARK else None


def check_root(root: Path, config: Path | None = None, redo: bool | None = False) -> None:
    """Refuse a directory that is not empty and no run, or a run that another `config` file began. Raises RunError.

    A file that is no longer there has been moved, and whoever redoes the run takes it over; `redo` is None for commands
    that cannot be told to.
    """
    with disk_errors(root, strict=True):
        above = next((path for path in (root, *root.parents) if path.exists() or path.is_symlink()), None)
        if above is not None and not above.is_dir():
            raise RunError(f"{above} is a file; --out must name a run directory")
        names = sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    if not names:
        return
    found = read_run(root)
    if found is None:
        if RUN in names:
            raise RunError(f"{root / RUN} is not as plugbridge wrote it; put it back, or choose another --out")
        if "config.yaml" in names and all(read_started(root / name) for name in names if (root / name).is_dir()):
            raise RunError(
                f"{root} was made by an older plugbridge, which `plugbridge report` still reads; choose another --out"
            )
        raise RunError(f"{root} is not empty and not a run; choose another --out")
    if found["format"] > FORMAT:
        raise RunError(f"{root} was made by plugbridge {found.get('plugbridge')}, this is {__version__}; use that one")
    known = Path(found["config"])
    if config is None or redo or not found["config"] or known == resolved(config):
        return
    begun = [name for name in names if name != OLD and read_started(root / name) is not None]
    if begun and known.exists():
        over = f", or let it take over with --redo, which keeps stages that differ in {root / OLD}"
        raise RunError(
            f"{root} is the run of {known}, with the stages {', '.join(begun)}; give this one a directory of its own "
            f"with --out{over if redo is not None else ''}"
        )


def check_places(root: Path, stages: Iterable[str]) -> None:
    """Refuse a run directory in which a stage, the lock or a file of the run cannot be written. Raises RunError."""
    check_folder(root, "--out must name a run directory")
    for name in sorted(stages):
        state_of(root / name, "")  # of no settings: refused is what is not ours
    lock = root / ".lock"
    if lock.is_dir():
        raise RunError(f"cannot write {lock}: Is a directory; move it away, or choose another --out")
    run = read_run(root)
    for name in ("config.yaml", "environment.json"):
        path = root / name
        with disk_errors(path, strict=True):
            if path.exists() or path.is_symlink():
                _check_own(path, _digest_of_text(path), {} if run is None else run["wrote"])


def _digest_of_text(path: Path) -> str:
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, of which reading may wait for ever
        raise RunError(f"{path} is no file; move it away, or choose another --out")
    return digest_of(path.read_bytes().decode("utf-8", "replace"))


def _check_own(path: Path, digest: str, wrote: Mapping[str, list[str]]) -> None:
    noted: object = wrote.get(path.name)
    if not isinstance(noted, list) or digest not in noted:
        raise RunError(f"{path} is not as plugbridge wrote it; move it away, or choose another --out")


def mark_run(root: Path, config: Path | None, redo: bool | None) -> None:
    """Make a directory a run, begun by a configuration file. The caller holds its lock. Raises RunError."""
    check_root(root, config, redo)
    found = read_run(root)
    if found is None:
        found = {"what": _MARK, "format": FORMAT, "plugbridge": __version__, "config": "", "wrote": {}}
    elif config is None or found["config"] == str(resolved(config)):
        return
    write_marker(root / RUN, {**found, "config": "" if config is None else str(resolved(config))})


def write_own(root: Path, name: str, text: str) -> None:
    """Write a file beside a run's stages, unless somebody else wrote the one that is there. Raises RunError.

    The caller holds the lock of the run.
    """
    path, run = root / name, read_run(root)
    assert run is not None  # marked when it was locked
    wrote: dict[str, list[str]] = run["wrote"]
    with disk_errors(path, strict=True):
        found = _digest_of_text(path) if path.exists() or path.is_symlink() else None
    new = digest_of(text)
    if found == new:
        return
    if found is not None:
        _check_own(path, found, wrote)
    # noted first: a kill in between leaves the old file, which is noted, too
    write_marker(root / RUN, {**run, "wrote": {**wrote, name: [new] if found is None else [found, new]}})
    write_text(path, text)
