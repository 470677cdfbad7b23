"""A run directory in which anything may have changed: read, gone on with or refused in one line, never a traceback."""

import json
import os
import random
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plugbridge.config import parse_config
from plugbridge.errors import PlugbridgeError, RunError
from plugbridge.files import digest_of
from plugbridge.markers import RUN, check_root, read_run, write_marker, write_own
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.report import read_report
from plugbridge.run import Stage, check_stages, execute, locked
from plugbridge.stages.build import build_stages
from test_durability import start

ASKED = int(os.environ.get("PLUGBRIDGE_FUZZ", "0"))
CASES = ASKED or 2000
FIRST = secrets.randbelow(2**32) if ASKED else 0
"""Cases follow from their numbers, which are other ones in every run where it is asked how many there are to be."""
WHOLE = 60
"""Cases that go on with the run instead of only looking at it."""
VALUES: list[Any] = [None, True, -1, 0, 1e308, 10**30, "", "x\0", "../../x", "é" * 300, [], [[]], {}, {"a": {"b": []}}]
Run = tuple[Path, list[Stage], dict[Path, bytes]]


@pytest.fixture(scope="module")
def run(
    pairs: Callable[[str], tuple[Path, Path]], toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished run, stages that say they ran, and the run's files."""
    small, large = pairs("gpt2")
    train = {"steps": 2, "batch_size": 4}
    raw = {
        "small": str(small), "large": str(large), "task": toy, "device": "cpu", "method": {"rank": 2}, "tune": train,
        "couple": train, "ceiling": train, "score": {"samples": 4}, "prune": {"reduction": 2}, "evaluate": {"limit": 4},
    }  # fmt: skip
    root = tmp_path_factory.mktemp("fuzz") / "run"
    start(raw, root)
    with locked(root):
        write_own(root, "config.yaml", json.dumps(raw))
    real = build_stages(prepare(parse_config(raw, "test"), None), root, Silent())
    return (
        root,
        [replace(stage, work=_again, room=lambda: 0) for stage in real],
        {p: p.read_bytes() for p in _files(root)},
    )


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


class _Ran(PlugbridgeError):
    """A stage was begun: what is fuzzed was accepted as something to go on from."""


def _again(_folder: Path) -> Any:
    raise _Ran("again")


def _spoil(rng: random.Random, path: Path, content: bytes) -> str:
    """Change a file in some way; returns how."""
    kinds = ["gone", "cut", "zeroed", "noise", "folder", "nowhere", "itself", "stage is a file"]
    if path.suffix == ".json":
        kinds = [*kinds, "text", *["value"] * 8, *["sealed value"] * 8]
    kind = rng.choice(kinds)
    at = rng.randrange(len(content) + 1)
    if kind in ("gone", "folder", "nowhere", "itself"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind in ("nowhere", "itself"):
        path.symlink_to(path if kind == "itself" else path / "gone")
    elif kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "zeroed":
        path.write_bytes(content[:at] + bytes(len(content) - at))
    elif kind == "noise":
        path.write_bytes(content[:at] + rng.randbytes(9) + content[at:])
    elif kind == "text":
        path.write_text(rng.choice(["[" * 3000, "NaN", "1" * 5000, '"\\ud800"', '{"a": 1, "a": 2}', "[1]", ""]))
    elif kind == "stage is a file":
        shutil.rmtree(path.parent)
        path.parent.write_bytes(content)
    elif kind in ("value", "sealed value"):
        _change(rng, path, content, sealed=kind == "sealed value")
    return f"{kind} {path} {at}"


def _change(rng: random.Random, path: Path, content: bytes, sealed: bool) -> None:
    """Change or drop something of a JSON file; sealed, it is what another version might have written."""
    value = json.loads(content)
    inner = value
    while isinstance(inner, dict) and inner:
        key = rng.choice(list(inner))
        if not isinstance(inner[key], dict) or rng.random() < 0.4:
            if rng.random() < 0.4:
                del inner[key]
            else:
                inner[key] = rng.choice(VALUES)
            break
        inner = inner[key]
    if sealed and isinstance(value, dict):
        value.pop("seal", None)
        value["seal"] = digest_of(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def _looked_at(root: Path, stages: list[Stage]) -> list[str]:
    said: list[str] = []
    looks: list[Callable[[], Any]] = [
        lambda: read_report(root),
        lambda: check_root(root),
        lambda: check_stages(root, stages, None),
        lambda: check_stages(root, stages, "couple", redo=True),
    ]
    for look in looks:
        try:
            look()
        except PlugbridgeError as error:
            said.append(str(error))
    return said


def _gone_on_with(root: Path, stages: list[Stage]) -> list[str]:
    try:
        with locked(root):
            write_own(root, "config.yaml", "{}")
            execute(root, stages, None, lambda _stage, _what: None, redo=True)
    except PlugbridgeError as error:
        return [str(error)]
    return []


def _restored(root: Path, files: dict[Path, bytes]) -> None:
    shutil.rmtree(root) if root.is_dir() else root.unlink()
    _restored_in(root, files)


def _put_back(path: Path, files: dict[Path, bytes]) -> None:
    """Undo what was done to one file, or to its folder."""
    if path.parent.is_file():
        path.parent.unlink()
        _restored_in(path.parent, files)
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.write_bytes(files[path])


def _restored_in(folder: Path, files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        if folder in path.parents:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def test_no_change_of_a_run_directory_is_a_traceback(run: Run) -> None:
    root, stages, files = run
    names = [path for path in files if path.name != ".lock"]
    markers = [path for path in names if path.name in ("run.json", "started.json", "done.json")]
    assert _looked_at(root, stages) == []
    refused = 0
    for case in range(FIRST, FIRST + CASES):
        rng = random.Random(case)
        path = rng.choice(markers if rng.random() < 0.7 else names)
        how = _spoil(rng, path, files[path])
        try:
            said = _looked_at(root, stages)
            if on := case % max(1, CASES // WHOLE) == 0:
                said += _gone_on_with(root, stages)
        except Exception as error:
            raise AssertionError(f"case {case}: {how}") from error
        assert all("\n" not in line for line in said), (how, said)
        refused += bool(said)
        _restored(root, files) if on or not root.is_dir() else _put_back(path, files)
    assert refused > CASES // 3  # the changes are seen
    assert _looked_at(root, stages) == []


def test_what_a_run_notes_of_its_files_is_digests_or_nothing(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with locked(root):
        write_own(root, "config.yaml", "a")
        marker = read_run(root)
        assert marker is not None
        for noted in (-1, None, "x", {}, [1]):
            write_marker(root / RUN, {**marker, "wrote": {"config.yaml": noted}})
            with pytest.raises(RunError, match=r"config\.yaml is not as plugbridge wrote it"):
                write_own(root, "config.yaml", "b")
        assert (root / "config.yaml").read_text() == "a"
