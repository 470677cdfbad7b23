"""Runs are durable: killed at any write, out of disk, changed, damaged or locked, they end the same."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

import plugbridge.run as run_module
from conftest import ReadOnce
from plugbridge.config import parse_config
from plugbridge.errors import PlugbridgeError, RunError
from plugbridge.files import disk_errors, folder_atomically, write_atomically, write_json, write_text
from plugbridge.prepare import prepare
from plugbridge.progress import Silent
from plugbridge.run import execute, locked, stage_digests
from plugbridge.stages.build import build_stages

STAGES = ("tune", "score", "prune", "couple", "plug", "evaluate")
TRAIN = {"steps": 5, "batch_size": 4, "checkpoint_every": 2}
SETTINGS: dict[str, Any] = {  # dropout and a learned down: everything that could lose its place
    "method": {"name": "lora", "rank": 2, "dropout": 0.1},
    "tune": TRAIN,
    "couple": {**TRAIN, "mode": "standalone", "down": "learned"},
    "ceiling": None,
    "evaluate": {"batch_size": 8, "limit": 12},
}


class Recorder(Silent):
    """Progress that remembers where every bar began."""

    def __init__(self) -> None:
        self.began: dict[str, int] = {}

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
        self.began[title] = done
        with super().bar(title, total, done) as advance:
            yield advance


def start(
    raw: dict[str, Any], root: Path, only: str | None = None, progress: Any = None, redo: bool = False
) -> dict[str, str]:
    """A process's work on a run, in this process; returns what was said of each stage."""
    torch.manual_seed(987)  # a run owes nothing to the generator's state
    stages = build_stages(prepare(parse_config(raw, "test"), None), root, progress or Silent())
    said: dict[str, str] = {}
    with locked(root):
        execute(root, stages, only, said.__setitem__, redo=redo)
    return said


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        costs = ("seconds", "peak_bytes", "reserved_bytes", "outputs", "seal")
        return {key: timeless(inner) for key, inner in value.items() if key not in costs}
    return value


def artefacts(root: Path) -> dict[str, Any]:
    """Everything a run left, hidden files too, without its costs."""
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_file() and name not in (".lock", "run.json"):
            content = path.read_bytes()
            found[name] = timeless(json.loads(content)) if path.name == "done.json" else content
    return found


def stamps(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def scene(
    pairs: Callable[[str], tuple[Path, Path]], toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One uninterrupted run, with a copy of the disk as a kill just before each rename would leave it."""
    small, large = pairs("gpt2")
    base = {"small": str(small), "large": str(large), "task": toy, "score": {"samples": 6}, "device": "cpu"}
    raw = {**base, "prune": {"reduction": 2}, **SETTINGS}
    top = tmp_path_factory.mktemp("durable")
    whole = top / "whole"
    killed: dict[str, list[Path]] = {}
    replace, unlink = Path.replace, Path.unlink

    def snapshot(path: Path, half: bool) -> None:
        stage = path.relative_to(whole).parts[0]
        copies = killed.setdefault(stage, [])
        copy = top / f"{stage}-{len(copies)}-{path.name.strip('.')}"
        shutil.copytree(whole, copy)
        copies.append(copy)
        left = copy / path.relative_to(whole)
        for file in [left, *left.rglob("*")] if half else []:
            if file.is_file():  # the write before the rename was itself cut short
                os.truncate(file, file.stat().st_size // 2)

    def replacing(self: Path, target: Path) -> Path:
        snapshot(self, half=True)
        return replace(self, target)

    def unlinking(self: Path, missing_ok: bool = False) -> None:
        if self.name == "checkpoint.pt" and self.exists():
            snapshot(self, half=False)
        unlink(self, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replacing)
        patch.setattr(Path, "unlink", unlinking)
        start(raw, whole)
    return {"raw": raw, "root": whole, "expected": artefacts(whole), "killed": killed}


def only_of(found: dict[str, Any], *stages: str) -> dict[str, Any]:
    return {name: content for name, content in found.items() if name.split("/")[0] in stages}


def done_before(expected: dict[str, Any], stage: str) -> dict[str, Any]:
    return only_of(expected, *STAGES[: STAGES.index(stage)])


def copy_without(scene: dict[str, Any], root: Path, *stages: str) -> Path:
    shutil.copytree(scene["root"], root)
    for stage in stages:
        shutil.rmtree(root / stage)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_write_and_resumed_ends_the_same(scene: dict[str, Any], stage: str) -> None:
    least = {"tune": 8, "score": 4, "prune": 5, "couple": 10, "plug": 3, "evaluate": 6}
    assert len(scene["killed"][stage]) >= least[stage]  # the kills below happen
    resumed: set[int] = set()
    for root in scene["killed"][stage]:
        progress = Recorder()
        done = (root / stage / "done.json").exists()  # killed before the checkpoint was taken away
        said = start(scene["raw"], root, only=stage, progress=progress)
        assert said == {stage: "skipped" if done else "running"}, root.name
        assert only_of(artefacts(root), *STAGES[: STAGES.index(stage) + 1]) == {
            **done_before(scene["expected"], stage),
            **only_of(scene["expected"], stage),
        }, root.name
        resumed.update(done for title, done in progress.began.items() if title.startswith(("tune", "couple")))
    assert resumed == ({0, 2, 4, 5} if stage in ("tune", "couple") else set())  # from the last step checkpoint


EVERY_TRAINING = {
    "tune": "tune small", "repair": "repair (response)", "couple": "couple (feedback)", "polish": "polish",
    "ceiling": "tune large (ceiling)", "small_finetuned": "fine-tune small", "large_ladder": "ladder beside large",
}  # fmt: skip


def test_an_interrupt_behind_the_last_step_costs_no_step(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any training: its validation, and writing what came of it, take long where models are large."""
    few = {"steps": 2, "batch_size": 2, "checkpoint_every": 50}
    raw = run_config(
        tune=few, ceiling=few, couple={**few, "mode": "feedback"}, repair={**few, "target": "response"},
        polish={"evaluations": 4, "rows": 2, "batch_size": 2}, prune={"reduction": 2}, evaluate={"limit": 2},
        score={"samples": 2}, baselines={"small_finetuned": few, "large_ladder": few},
    )  # fmt: skip
    marked = run_module.outputs_of

    def interrupted(folder: Path) -> dict[str, str]:
        monkeypatch.setattr(run_module, "outputs_of", marked)
        raise KeyboardInterrupt

    for stage in ("tune", "score", "prune", "repair", "couple", "polish", "ceiling", "small_finetuned", "large_ladder"):
        if stage in EVERY_TRAINING:
            monkeypatch.setattr(run_module, "outputs_of", interrupted)
            with pytest.raises(KeyboardInterrupt):
                start(raw, tmp_path, only=stage)
        progress = Recorder()
        start(raw, tmp_path, only=stage, progress=progress)
        if (title := EVERY_TRAINING.get(stage)) not in (None, "polish"):
            assert progress.began[title] == 2
        assert not list((tmp_path / stage).glob("checkpoint.*"))
        assert not [
            name
            for name in json.loads((tmp_path / stage / "done.json").read_text())["outputs"]
            if name.startswith("checkpoint.")
        ]


KILLER = """
import multiprocessing, os, signal, sys
stop, _, count = os.environ["KILL_AT"].partition("@")
seen = 0
def hook(event, args):
    global seen
    if event == "os.rename" and str(args[1]).endswith(stop):
        seen += 1
        if seen == int(count):
            if multiprocessing.parent_process() is not None:  # a stage's own process
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def test_a_process_killed_twice_and_resumed_ends_like_an_uninterrupted_one(
    run_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = run_config("t5", "prefix", ceiling=None, evaluate={"batch_size": 8, "limit": 8})
    raw["couple"]["fidelity_rows"] = 2
    monkeypatch.setattr(ReadOnce, "folders", set())  # a copy's weights begin at other addresses: last digits differ
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER, encoding="utf-8")
    command = [sys.executable, "-m", "plugbridge", "run", "c.yaml", "--out", "killed"]
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    results = [
        subprocess.run(
            command, cwd=tmp_path, env={**environment, "KILL_AT": at}, capture_output=True, text=True, check=False
        )
        for at in ("couple/checkpoint.pt@3", "evaluate/predictions/large_zero_shot.jsonl@1")
    ]
    assert [r.returncode for r in results] == [-signal.SIGKILL] * 2, results[-1].stderr
    assert "resuming at step 2" in results[1].stderr
    assert "3/6 prune: done before, skipped" in results[1].stderr
    assert "Warning" not in results[1].stderr
    expected = dict.fromkeys(STAGES[:-1], "skipped") | {"evaluate": "running"}
    assert start(raw, tmp_path / "killed") == expected
    start(raw, tmp_path / "whole")
    assert only_of(artefacts(tmp_path / "killed"), *STAGES) == artefacts(tmp_path / "whole")


def test_a_second_run_skips_everything_and_touches_nothing(scene: dict[str, Any]) -> None:
    before = stamps(scene["root"])
    assert start(scene["raw"], scene["root"]) == dict.fromkeys(STAGES, "skipped")
    assert stamps(scene["root"]) == before


def changed(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {**raw, section: {**(raw.get(section) or {}), name: value} if name else value}


AFTER_TUNE, AFTER_SCORE = {"couple", "plug", "evaluate"}, {"prune", "couple", "plug", "evaluate"}
EVERYTHING = {*STAGES, "ceiling"}


@pytest.mark.parametrize(
    ("key", "value", "redone"),
    [
        ("tune.steps", 6, {"tune", *AFTER_TUNE}),
        ("tune.learning_rate", 0.5, {"tune", *AFTER_TUNE}),
        ("method.rank", 3, {"tune", "ceiling", *AFTER_TUNE}),
        ("method.name", "adapter", {"tune", "ceiling", *AFTER_TUNE}),
        ("score.samples", 5, {"score", *AFTER_SCORE}),
        ("score.importance", "magnitude", {"score", *AFTER_SCORE}),
        ("prune.reduction", 4, AFTER_SCORE),
        ("prune", {"budget": 0.5}, AFTER_SCORE),
        ("couple.steps", 6, AFTER_TUNE),
        ("couple.bridge", "freeze", AFTER_TUNE),
        ("tune.optimizer", "adafactor", {"tune", *AFTER_TUNE}),
        ("couple.optimizer", "adamw", AFTER_TUNE),
        ("ceiling.steps", 6, {"ceiling", "evaluate"}),
        ("evaluate.limit", 5, {"evaluate"}),
        ("evaluate.split", "validation", {"evaluate"}),
        ("seed", 1, EVERYTHING),
        ("dtype", "bfloat16", EVERYTHING),
        ("task.prompt", "it is : {word}", EVERYTHING),
        ("tune.checkpoint_every", 3, set()),
        ("couple.checkpoint_every", 3, set()),
        ("couple.recompute", False, set()),
        ("couple.optimizer", "adafactor", set()),  # standalone's own
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(
    scene: dict[str, Any], tmp_path: Path, key: str, value: Any, redone: set[str]
) -> None:
    raw = {**scene["raw"], "method": {"name": "lora", "rank": 2}, "ceiling": TRAIN}
    assert redone_by(raw, changed(raw, key, value), tmp_path) == redone


def test_a_key_that_came_later_is_not_in_the_digest_at_its_default(scene: dict[str, Any], tmp_path: Path) -> None:
    """Runs from before there was a choice of optimizers go on."""
    raw = changed(scene["raw"], "couple.optimizer", "adamw")
    stages = build_stages(prepare(parse_config(raw, "test"), None), tmp_path, Silent())
    settings = {stage.name: stage.depends[stage.name] for stage in stages if stage.name in ("tune", "couple")}
    assert all("steps" in found and "optimizer" not in found for found in settings.values())


def digests(raw: dict[str, Any], root: Path) -> dict[str, str]:
    return stage_digests(build_stages(prepare(parse_config(raw, "test"), None), root, Silent()))


def redone_by(raw: dict[str, Any], other: dict[str, Any], root: Path) -> set[str]:
    old, new = digests(raw, root), digests(other, root)
    return {name for name in old if old[name] != new[name]}


@pytest.mark.parametrize(
    ("file", "redone"),
    [
        ("small/model.safetensors", {"tune", *AFTER_TUNE}),
        ("large/model.safetensors", {"score", "ceiling", *AFTER_SCORE}),
        ("train.jsonl", EVERYTHING),
        ("test.jsonl", EVERYTHING),
    ],
)
def test_a_changed_input_file_redoes_what_depends_on_it(
    scene: dict[str, Any], tmp_path: Path, file: str, redone: set[str]
) -> None:
    raw = {**scene["raw"], "ceiling": TRAIN, "task": dict(scene["raw"]["task"])}
    for name in ("small", "large"):
        raw[name] = str(shutil.copytree(raw[name], tmp_path / name))
    for name in ("train", "validation", "test"):
        raw["task"][name] = str(shutil.copy(raw["task"][name], tmp_path / f"{name}.jsonl"))
    old = digests(raw, tmp_path)
    path = tmp_path / file
    content = bytearray(path.read_bytes())
    content[-9:] = content[-9:].swapcase() if path.suffix == ".jsonl" else bytes(9)
    path.write_bytes(path.read_bytes() + b" \n" if path.suffix == ".jsonl" else bytes(content))
    new = digests(raw, tmp_path)
    assert {name for name in old if old[name] != new[name]} == redone


def test_a_changed_setting_starts_its_stage_from_nothing(scene: dict[str, Any], tmp_path: Path) -> None:
    root = copy_without(scene, tmp_path / "run", *STAGES[1:])
    (root / "tune" / "checkpoint.pt").write_bytes(b"of other settings")
    raw = changed(scene["raw"], "tune.learning_rate", 0.5)
    for folder in (root, tmp_path / "fresh"):
        start(raw, folder, only="tune", redo=True)
    assert only_of(artefacts(root), "tune") == artefacts(tmp_path / "fresh")


def test_only_the_changed_stage_runs_again(scene: dict[str, Any], tmp_path: Path) -> None:
    root = copy_without(scene, tmp_path / "run")
    said = start(changed(scene["raw"], "evaluate.limit", 5), root, redo=True)
    assert said == {**dict.fromkeys(STAGES, "skipped"), "evaluate": "running"}
    assert len((root / "evaluate/predictions/small_tuned.jsonl").read_text().splitlines()) == 5
    assert start(scene["raw"], root) == dict.fromkeys(STAGES, "skipped")  # and back: it was kept
    assert only_of(artefacts(root), *STAGES) == scene["expected"]


def zeroed(path: Path) -> None:
    """Its size stays."""
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


@pytest.mark.parametrize(
    ("stage", "file", "damage"),
    [
        ("tune", "module/adapter_model.safetensors", cut),
        ("tune", "module/adapter_model.safetensors", zeroed),
        ("prune", "bridge/config.json", Path.unlink),
        ("prune", "keep.safetensors", zeroed),
        ("couple", "coupled.safetensors", zeroed),
        ("plug", "checkpoint/adapter_model.safetensors", cut),
        ("plug", "done.json", cut),
        ("plug", "done.json", zeroed),
    ],
)
def test_a_lost_cut_or_zeroed_output_is_made_again(
    scene: dict[str, Any], tmp_path: Path, stage: str, file: str, damage: Callable[[Path], None]
) -> None:
    root = copy_without(scene, tmp_path / "run")
    damage(root / stage / file)
    assert start(scene["raw"], root) == {**dict.fromkeys(STAGES, "skipped"), stage: "running"}
    assert only_of(artefacts(root), *STAGES) == scene["expected"]


def test_another_seed_gives_another_module(scene: dict[str, Any], tmp_path: Path) -> None:
    start({**scene["raw"], "seed": 1}, tmp_path / "run", only="tune")
    name = "tune/module/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() != scene["expected"][name]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="another process is working in"), locked(tmp_path):
        pass
    with locked(tmp_path):  # and let in afterwards
        pass


def system_error(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


def torch_error() -> Exception:
    """What torch.save raises when the file under it is out of space."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    error.__context__ = system_error()
    return error


def safetensors_error() -> Exception:
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("stage", "file", "error"),
    [
        ("tune", "checkpoint.pt", torch_error),
        ("tune", "module", safetensors_error),
        ("score", "energy.safetensors", safetensors_error),
        ("prune", "bridge", safetensors_error),
        ("couple", "checkpoint.pt", torch_error),
        ("couple", "bridge_module", system_error),
        ("plug", "started.json", system_error),
        ("plug", "checkpoint", safetensors_error),
        ("plug", "done.json", system_error),
        ("evaluate", "large_plugged.jsonl", system_error),
    ],
)
def test_a_full_disk_is_one_error_and_loses_nothing(
    scene: dict[str, Any], tmp_path: Path, stage: str, file: str, error: Callable[[], Exception]
) -> None:
    root = copy_without(scene, tmp_path / "run", *STAGES[STAGES.index(stage) :])
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == file and stage in target.parts:
            raise error()
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(RunError, match=r"no space left to write .*; free some disk and run again"):
            start(scene["raw"], root, only=stage)
    assert only_of(artefacts(root), *STAGES[: STAGES.index(stage)]) == done_before(scene["expected"], stage)
    assert not (root / stage / "done.json").exists()
    start(scene["raw"], root, only=stage)
    assert only_of(artefacts(root), stage) == only_of(scene["expected"], stage)


def in_a_copy(work: Callable[[], Any], limit: int | None = None) -> str:
    """What a piece of work says in a copy of this process, in which no file may be larger than `limit`."""
    read, write = os.pipe()
    copy = os.fork()
    if copy == 0:
        said = "nothing"
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            if limit is not None:  # coverage of a pipe is none of a file, but of whoever writes beside this
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(copy, 0)
    return said


def save_in_folder(path: Path, write: Callable[[Path], Any]) -> None:
    with folder_atomically(path.parent) as folder:
        write(folder / path.name)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "x" * 9000),
    "json": lambda path: write_json(path, list(range(9000))),
    "in a folder": lambda path: save_in_folder(path, lambda file: write_text(file, "x" * 9000)),
    "torch": lambda path: torch_save(path, {"x": torch.zeros(9000)}),
    "safetensors": lambda path: safe_save(path, {"x": torch.zeros(9000)}),
}


def torch_save(path: Path, value: Any) -> None:
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)


def safe_save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with write_atomically(path) as temporary:
        save_file(tensors, str(temporary))


@pytest.mark.skipif(sys.platform != "linux", reason="its limits and devices")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_file_sizes_names_the_file_that_users_know(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "folder" / "file"
    assert in_a_copy(lambda: WRITERS[writer](path)) == "nothing"
    before = path.read_bytes()
    said = in_a_copy(lambda: WRITERS[writer](path), limit=4096)
    assert said == f"RunError: the limit on file sizes (ulimit -f) is too low to write {path}; raise it"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "file"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EISDIR, "move away what is in its place, or choose another"),
        (errno.ENOTDIR, "move away what is in its place, or choose another"),
        (errno.ENAMETOOLONG, "choose another place"),
        (errno.EIO, "choose another place"),
        (errno.ENOENT, "choose another place"),
    ],
)
def test_the_remedy_is_of_what_is_wrong(tmp_path: Path, number: int, remedy: str) -> None:
    said = rf"cannot write .*: {re.escape(os.strerror(number))}; {remedy}$"
    with pytest.raises(RunError, match=said), disk_errors(tmp_path / "x", strict=True):
        raise system_error(number)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunError, match="move away what is in its place"), disk_errors(tmp_path / "link", strict=True):
        raise system_error(errno.ENOENT)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.with_name("mine"))])
def test_a_temporary_name_that_is_taken_is_no_trap(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    make(tmp_path / ".file.part")
    write_text(tmp_path / "file", "ours")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "file": "ours",
        "mine": "mine",
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="its devices")
def test_a_device_that_is_full_is_named(tmp_path: Path) -> None:
    def fill() -> None:
        with disk_errors(tmp_path / ".bridge.part" / "config.json"), Path("/dev/full").open("w") as file:
            file.write("x" * 9000)

    said = in_a_copy(fill)
    assert said.startswith(f"RunError: no space left to write {tmp_path / 'bridge' / 'config.json'}; free some disk")


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.EINVAL, "invalid argument")])
def test_other_errors_keep_their_traceback(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not allowed to write .*: Permission denied"), disk_errors(tmp_path):
        raise system_error(errno.EACCES)


def test_a_user_error_from_a_system_error_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(PlugbridgeError, match="mine"), disk_errors(tmp_path):
        raise PlugbridgeError("mine") from system_error(errno.EACCES)


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    with folder_atomically(tmp_path / "folder") as folder:
        (folder / "x").write_text("old", encoding="utf-8")
    with suppress(KeyError), write_atomically(tmp_path / "a.json") as path:
        path.write_text("half", encoding="utf-8")
        raise KeyError
    with suppress(KeyError), folder_atomically(tmp_path / "folder") as folder:
        (folder / "x").write_text("new", encoding="utf-8")
        raise KeyError
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"n": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "folder"]
    (tmp_path / "folder").rename(tmp_path / ".folder.old")  # killed before the new one took its place
    with suppress(KeyError), folder_atomically(tmp_path / "folder") as folder:
        raise KeyError
    assert (tmp_path / "folder" / "x").read_text() == "old"
