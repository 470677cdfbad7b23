"""Borrowing stages of other runs: today's only, whole only, and never over what is done."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from plugbridge.markers import is_done, write_marker
from plugbridge.run import Stage, StageResult, borrow, execute, stage_digests

NAMES = ("first", "second", "third")


def _stages(ran: list[str] | None = None, **settings: int) -> list[Stage]:
    """Three stages in a row; each writes two files, one of them in a folder, and says that it ran."""

    def stage(name: str, needs: tuple[str, ...]) -> Stage:
        def work(folder: Path) -> StageResult:
            (ran if ran is not None else []).append(name)
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "weights").write_text(f"{name} {settings.get(name, 0)}", encoding="utf-8")
            (folder / "losses.json").write_text("[]", encoding="utf-8")
            return StageResult({}, float(len(ran or [])), 0)

        return Stage(name, needs, {"setting": settings.get(name, 0)}, work)

    return [stage("first", ()), stage("second", ("first",)), stage("third", ("second",))]


def _run(root: Path, stages: Sequence[Stage]) -> dict[str, str]:
    said: dict[str, str] = {}
    execute(root, stages, None, said.__setitem__)
    return said


def _files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and times of everything in a run."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def _contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in _files(root).items()}


def _took(folder: Path, seconds: float) -> None:
    """Let a stage have taken so long."""
    marker = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    del marker["seal"]
    write_marker(folder / "done.json", {**marker, "seconds": seconds})


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    _run(tmp_path / "donor", _stages())
    return tmp_path / "donor"


def test_what_is_borrowed_is_the_donors_byte_for_byte_and_not_done_again(donor: Path, tmp_path: Path) -> None:
    before, ran = _files(donor), []
    borrow(tmp_path / "run", [donor], _stages(ran))
    assert _contents(tmp_path / "run") == _contents(donor)
    assert _run(tmp_path / "run", _stages(ran)) == dict.fromkeys(NAMES, "skipped")
    assert ran == []
    assert _files(donor) == before
    (tmp_path / "run" / "first" / "losses.json").write_text("[1]", encoding="utf-8")  # a copy, not a link
    assert _files(donor) == before


@pytest.mark.parametrize("changed", NAMES)
def test_only_stages_with_todays_digest_are_borrowed(donor: Path, tmp_path: Path, changed: str) -> None:
    """A changed stage and all that need it are done anew."""
    ran: list[str] = []
    stages = _stages(ran, **{changed: 1})
    borrow(tmp_path / "run", [donor], stages)
    kept = NAMES[: NAMES.index(changed)]
    assert {name.split("/")[0] for name in _files(tmp_path / "run")} == set(kept)
    _run(tmp_path / "run", stages)
    assert tuple(ran) == NAMES[NAMES.index(changed) :]


def test_the_first_donor_that_has_a_stage_gives_it(donor: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    stages = _stages(third=1)
    _run(other, stages)
    _took(other / "first", 99.0)
    borrow(tmp_path / "run", [tmp_path / "gone", other, donor], stages)
    assert _contents(tmp_path / "run") == _contents(other)
    borrow(tmp_path / "again", [donor, other], stages)
    assert _contents(tmp_path / "again" / "first") == _contents(donor / "first") != _contents(other / "first")
    assert _contents(tmp_path / "again" / "third") == _contents(other / "third")


def test_a_done_stage_is_never_overwritten(donor: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    _run(root, _stages(third=1))
    _took(root / "first", 99.0)
    before = _files(root)
    borrow(root, [donor], _stages(third=1))
    assert _files(root) == before  # not even the third, of other settings than the donor's


def test_what_a_stage_of_other_settings_left_is_set_aside(donor: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    _run(root, _stages(first=1))
    (root / "first" / "checkpoint.pt").write_text("of other settings", encoding="utf-8")
    before = _contents(root)
    borrow(root, [donor], _stages())
    kept = {name.partition("/")[2]: content for name, content in _contents(root / "old").items()}
    assert kept == before
    now = {name: content for name, content in _contents(root).items() if not name.startswith("old/")}
    assert now == _contents(donor)


@pytest.mark.parametrize("loss", ["done.json", "model/weights", "cut"])
def test_a_donor_that_is_not_whole_gives_nothing(donor: Path, tmp_path: Path, loss: str) -> None:
    if loss == "cut":
        os.truncate(donor / "first" / "model" / "weights", 3)
    else:
        (donor / "first" / loss).unlink()
    borrow(tmp_path / "run", [donor], _stages())
    assert {name.split("/")[0] for name in _files(tmp_path / "run")} == {"second", "third"}


class Killed(BaseException):
    """The process is gone."""


def test_a_run_killed_while_it_copies_is_not_taken_for_done(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each file, and with each file half written; a stage appears as a whole."""
    stages, copy = _stages(), shutil.copyfile
    digests = stage_digests(stages)
    whole = _contents(donor)
    orders: list[list[str]] = []
    for half in (False, True):
        for last in range(len(whole)):
            root, order = tmp_path / f"{last} {half}", []

            def copying(source: Path, target: Path, *rest, root=root, order=order, last=last, half=half, **more):
                order.append(str(Path(target).relative_to(root)).replace(".part", "").removeprefix("."))
                if len(order) <= last:
                    return copy(source, target, *rest, **more)
                if half:
                    content = Path(source).read_bytes()
                    Path(target).write_bytes(content[: len(content) // 2])
                raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(shutil, "copyfile", copying)
                with pytest.raises(Killed):
                    borrow(root, [donor], stages)
            assert not any(path.name.startswith(".") for path in root.iterdir())
            stopped = order[-1].split("/")[0]
            done = [name for name in NAMES if is_done(root / name, digests[name])]
            assert done == list(NAMES[: NAMES.index(stopped)]), order
            borrow(root, [donor], stages)
            assert _contents(root) == whole
            orders.append(order)
    assert sorted(max(orders, key=len)) == sorted(whole)


def test_a_run_killed_while_it_copies_goes_on_without_its_donor(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, copy, ran = tmp_path / "run", shutil.copyfile, []

    def copying(source: Path, target: Path, *rest, **more):
        if Path(target).name == "done.json":
            raise Killed
        return copy(source, target, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copying)
        with pytest.raises(Killed):
            borrow(root, [donor], _stages())
    assert not (root / "first").exists()
    assert _run(root, _stages(ran)) == dict.fromkeys(NAMES, "running")
    assert tuple(ran) == NAMES
