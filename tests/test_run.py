"""What a run directory keeps: nothing of the user's is touched, nothing that was done is lost."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from plugbridge.errors import RunError
from plugbridge.files import digest_of
from plugbridge.markers import RUN, changes, check_places, check_root, read_marker, read_run, write_own
from plugbridge.run import Stage, StageResult, check_stages, execute, locked

NAMES = ("tune", "couple", "evaluate")


def stages_of(ran: list[str] | None = None, **settings: Any) -> list[Stage]:
    """Three stages in a row, that read the file of what they need and say that they ran."""

    def stage(name: str, needs: tuple[str, ...]) -> Stage:
        def work(folder: Path) -> StageResult:
            (ran if ran is not None else []).append(name)
            (folder / "module").mkdir(exist_ok=True)
            (folder / "module" / "weights").write_text(f"{name} {settings.get(name)}", encoding="utf-8")
            return StageResult({}, 0.0, 0)

        return Stage(name, needs, {"seed": 0, name: {"steps": settings.get(name, 100)}}, work)

    return [stage("tune", ()), stage("couple", ("tune",)), stage("evaluate", ("couple",))]


def run(root: Path, stages: Sequence[Stage], only: str | None = None, redo: bool = False) -> dict[str, str]:
    said: dict[str, str] = {}
    with locked(root):
        execute(root, stages, only, said.__setitem__, redo=redo)
    return said


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


PROJECT = {"config.yaml": "seed: 1  # mine\n", "tune/notes": "a", "score/data": "b", "evaluate/done.json": "{}"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of the user's own, with names that a run has too."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_folder_of_the_users_own_is_refused_and_left_as_it_is(project: Path) -> None:
    before = contents(project)
    with pytest.raises(RunError, match=r"is not empty and not a run; choose another --out"):
        check_root(project)
    with pytest.raises(RunError, match=r"is not empty and not a run"):
        run(project, stages_of())
    assert contents(project) == before
    (project / RUN).write_text("{}", encoding="utf-8")  # a file of that name is no marker
    with pytest.raises(RunError, match=r"run\.json is not as plugbridge wrote it"):
        run(project, stages_of())
    (project / RUN).unlink()
    assert contents(project) == before


@pytest.mark.parametrize("made", ["folder", "file", "nowhere", "cut marker", "marker is a folder"])
def test_a_stage_that_is_not_ours_is_never_removed(tmp_path: Path, made: str) -> None:
    root, place = tmp_path / "run", tmp_path / "run" / "couple"
    run(root, stages_of(), only="tune")
    if made in ("folder", "cut marker"):
        place.mkdir()
        name = "mine" if made == "folder" else "started.json"
        (place / name).write_text('{"digest": "x", "depends": {}}', encoding="utf-8")
    elif made == "marker is a folder":
        (place / "done.json").mkdir(parents=True)
    elif made == "file":
        place.write_text("mine", encoding="utf-8")
    else:
        place.symlink_to(tmp_path / "gone")
    before = contents(root)
    for redo in (False, True):
        said = r"couple( has no started\.json as| is a file, where| is a link to nowhere|/done\.json is a directory)"
        with pytest.raises(RunError, match=said):
            run(root, stages_of(), redo=redo)
        with pytest.raises(RunError, match=said):
            check_places(root, NAMES)
    assert contents(root) == before
    assert place.is_symlink() == (made == "nowhere")


def test_a_stage_that_was_moved_to_another_disk_and_linked_is_one(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(root, stages_of())
    (root / "couple").rename(tmp_path / "elsewhere")
    (root / "couple").symlink_to(tmp_path / "elsewhere")
    assert run(root, stages_of()) == dict.fromkeys(NAMES, "skipped")
    run(root, stages_of(couple=7), redo=True)
    assert (tmp_path / "elsewhere" / "module" / "weights").read_text() == "couple None"


def test_finished_stages_are_not_done_again_unless_that_is_said(tmp_path: Path) -> None:
    root, ran = tmp_path / "run", []
    run(root, stages_of(ran, tune=500))
    before = contents(root)
    ran.clear()
    with pytest.raises(RunError) as caught:
        run(root, stages_of(ran))
    said = str(caught.value)
    assert said.startswith(f"{root} holds other work, which would be done again (tune, couple, evaluate): ")
    assert "tune.steps 500 → 100; give the same settings, a directory of its own with --out, or --redo" in said
    assert "\n" not in said
    assert not ran
    assert contents(root) == before
    with pytest.raises(RunError, match=r"stage 'couple' needs 'tune', which was done with other settings: tune.steps"):
        run(root, stages_of(ran), only="couple")
    assert run(root, stages_of(ran), redo=True) == dict.fromkeys(NAMES, "running")
    kept = {f"old/1/{name}": content for name, content in before.items() if name != RUN}
    assert kept.items() <= contents(root).items()
    # the first settings again: nothing is done twice, and nothing lost
    ran.clear()
    assert run(root, stages_of(ran, tune=500)) == dict.fromkeys(NAMES, "skipped")
    assert {name: content for name, content in contents(root).items() if not name.startswith("old/")} == before
    assert (root / "old" / "2" / "tune" / "module" / "weights").read_text() == "tune None"
    assert ran == []


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("nowhere")])
def test_what_stands_where_stages_are_set_aside_is_named(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    run(tmp_path, stages_of())
    make(tmp_path / "old")
    with pytest.raises(RunError, match=r"/old is no directory, where what is set aside belongs; move it away"):
        run(tmp_path, stages_of(tune=7), redo=True)
    assert run(tmp_path, stages_of()) == dict.fromkeys(NAMES, "skipped")


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run(tmp_path, stages_of())
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match=rf"{name} is no file; move it away, or choose another --out"):
        check_places(tmp_path, NAMES)
    with locked(tmp_path), pytest.raises(RunError, match=rf"{name} is no file"):
        write_own(tmp_path, name, "seed: 0\n")


def test_half_done_work_of_other_settings_is_kept_too(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def half(folder: Path) -> StageResult:
        (folder / "checkpoint.pt").write_text("step 70", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, [Stage("tune", (), {"steps": 100}, half)])
    other = [Stage("tune", (), {"steps": 200}, lambda _folder: StageResult({}, 0.0, 0))]
    with pytest.raises(RunError, match=r"would be done again \(tune\): steps 100 → 200"):
        run(root, other)
    run(root, other, redo=True)
    assert (root / "old" / "1" / "tune" / "checkpoint.pt").read_text() == "step 70"


def test_a_stage_that_left_nothing_is_begun_anew_with_other_settings(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def interrupted(_folder: Path) -> StageResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, [Stage("tune", (), {"steps": 100}, interrupted)])
    assert run(root, stages_of())["tune"] == "running"
    assert not (root / "old").exists()


def test_a_run_belongs_to_its_file(tmp_path: Path) -> None:
    mine, theirs, root = tmp_path / "a" / "config.yaml", tmp_path / "b" / "config.yaml", tmp_path / "run"
    for path in (mine, theirs):
        path.parent.mkdir()
        path.touch()
    with locked(root, mine):
        pass
    with locked(root, theirs):  # nothing was done yet
        execute(root, stages_of(), None, lambda _stage, _what: None)
    with pytest.raises(RunError, match=r"is the run of .*b/config\.yaml, with the stages couple, eval") as caught:
        check_root(root, mine)
    assert "--out" in str(caught.value)
    assert "--redo" in str(caught.value)
    with pytest.raises(RunError) as caught:
        check_root(root, mine, None)
    assert "--redo" not in str(caught.value)
    check_root(root, theirs)
    with locked(root, mine, redo=True):
        check_stages(root, stages_of(), None)
    check_root(root, mine)
    mine.unlink()  # moved with its project
    check_root(root, theirs)


def test_a_file_that_somebody_else_wrote_stays(tmp_path: Path) -> None:
    with locked(tmp_path):
        write_own(tmp_path, "config.yaml", "seed: 1\n")
        write_own(tmp_path, "config.yaml", "seed: 2\n")
        check_places(tmp_path, NAMES)
        marker = read_run(tmp_path)
        assert marker is not None
        (tmp_path / "config.yaml").write_text("seed: 3  # mine\n", encoding="utf-8")
        for wrote in ({}, {"config.yaml": [digest_of("seed: 3  # mine\n")]}):  # and a note of it that is forged
            (tmp_path / RUN).write_text(json.dumps({**marker, "wrote": {**marker["wrote"], **wrote}}), encoding="utf-8")
            assert read_run(tmp_path) is None
        (tmp_path / RUN).write_text(json.dumps({**marker, "seal": digest_of(marker)}), encoding="utf-8")
        for look in (lambda: write_own(tmp_path, "config.yaml", "seed: 2\n"), lambda: check_places(tmp_path, NAMES)):
            with pytest.raises(RunError, match=r"config\.yaml is not as plugbridge wrote it; move it away"):
                look()
        assert (tmp_path / "config.yaml").read_text() == "seed: 3  # mine\n"
        (tmp_path / "config.yaml").unlink()
        write_own(tmp_path, "config.yaml", "seed: 2\n")
        (tmp_path / "environment.json").mkdir()
        with pytest.raises(RunError, match=r"cannot write .*environment\.json: Is a directory"):
            write_own(tmp_path, "environment.json", "{}")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/proc/x", r"(cannot write|not allowed to write) /proc/x"),
        ("/dev/null/x", r"/dev/null is a file"),
        ("{tmp}/" + "n" * 300, "File name too long"),
        ("{tmp}/a\0b", "embedded null"),
        ("{tmp}/loop/x", "loop"),
        ("{tmp}/locked", r"cannot write .*\.lock: Is a directory"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    root = Path(place.format(tmp=tmp_path))
    with pytest.raises(RunError, match=said) as caught:
        run(root, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=said):
        check_places(root, NAMES)


def test_what_changed_is_named_with_both_values() -> None:
    then = {
        "seed": 0,
        "task": {"files": {"file": "0" * 64, "train": "0" * 64, "test": "1" * 64}},
        "large": {"files": {"config.json": "0" * 64}},
        "tune": {"steps": 5, "rates": [1, 2]},
        "gone": None,
    }
    now = {
        "seed": 0,
        "task": {"files": {"file": "2" * 64, "train": "2" * 64, "test": "1" * 64}},
        "large": {"files": {"config.json": "2" * 64}},
        "tune": {"steps": 6, "rates": []},
    }
    assert changes(then, now) == [
        "the rows of task.file changed",
        "the task's train rows changed",
        "config.json of large has other content",
        "tune.steps 5 → 6",
        "tune.rates [1, 2] → []",
        "gone null → not set",
    ]
    commits = [{"large": {"source": "org/large", "commit": digit * 40}} for digit in "ab"]
    assert changes(*commits) == ['large.commit "aaaaaaaaaaaa" → "bbbbbbbbbbbb"']
    assert changes({"commit": None}, {"commit": "a" * 40}) == ['commit null → "aaaaaaaaaaaa"']
    assert changes({"prompt": "a" * 99}, {"prompt": "b"}) == [f'prompt "{"a" * 56}… → "b"']


def test_versions_are_of_the_process_that_did_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugbridge.run.versions", lambda: {"torch": "1.0"})
    run(tmp_path, stages_of(), only="tune")
    marker = read_marker(tmp_path / "tune")
    assert marker is not None
    assert marker["versions"] == {"torch": "1.0"}


def test_a_marker_that_was_changed_is_none(tmp_path: Path) -> None:
    run(tmp_path, stages_of())
    path = tmp_path / "tune" / "done.json"
    marker = json.loads(path.read_text())
    for change in ({"facts": {"sizes": 1}}, {"outputs": {}}, {"seal": None}, {"seal": "0"}):
        path.write_text(json.dumps({**marker, **change}), encoding="utf-8")
        assert read_marker(tmp_path / "tune") is None, change
    path.write_text(json.dumps(marker), encoding="utf-8")
    assert read_marker(tmp_path / "tune") is not None


def test_a_marker_without_a_seal_is_none_where_it_was_set_aside_either(tmp_path: Path) -> None:
    run(tmp_path, stages_of())
    run(tmp_path, stages_of(tune=7), redo=True)
    path = tmp_path / "old" / "1" / "tune" / "done.json"
    marker = json.loads(path.read_text())
    del marker["seal"]
    path.write_text(json.dumps(marker), encoding="utf-8")
    assert read_marker(path.parent) is None
    with pytest.raises(RunError, match=r"holds other work, which would be done again \(tune\)"):
        run(tmp_path, stages_of())  # what was changed there is not taken back
