"""What a run shows of itself: a bar that fits the terminal, the time that is left, and a line for what a stage gave."""

import logging
from pathlib import Path
from typing import Any

import pytest

from plugbridge.cli import job as job_module
from plugbridge.cli import terminal
from plugbridge.cli.job import Job, bar_line, clock, ended
from plugbridge.cli.terminal import announcer, log_here
from plugbridge.progress import trend

MARKER: dict[str, Any] = {
    "seconds": 44.4,
    "peak_bytes": 45 * 2**20,
    "facts": {"loss_first": 0.6931, "loss_last": 0.2112, "validation": {"accuracy": 0.5, "macro_f1": 0.4}},
}


@pytest.mark.parametrize("width", [39, 59, 79, 119])
def test_a_bar_fits_the_terminal(width: int) -> None:
    line = bar_line(width, "couple (feedback)", 120, 400, "loss 0.693 ↓", 40.2, 131)
    assert len(line) <= width
    assert line.startswith("  ")
    assert "120/400  " in line
    assert line.endswith("0:40 left, 2:11 in all")
    assert ("loss 0.693 ↓" in line) == (width > 40)
    assert ("couple (feedback)" in line) == (width > 60)
    assert ("━" in line) == (width > 70)


def test_a_bar_of_nothing_and_one_of_a_long_title() -> None:
    assert bar_line(39, "validate: large_finetuned on all rows", 1, 2, "", None, None) == (
        "  validate: large_finetuned on…  1/2"
    )
    assert bar_line(79, "plug", 0, 0, "", None, None) == "  plug  0/0"


def test_the_title_gives_way_before_the_times() -> None:
    assert bar_line(39, "couple (feedback)", 1, 9, "", 40, None) == "  couple (feedback)  1/9  0:40 left"
    assert bar_line(39, "couple (feedback)", 1, 9, "", 40, 309) == "  couple…  1/9  0:40 left, 5:09 in all"
    assert bar_line(39, "couple", 1200, 40000, "loss 1", 7000, 90000) == "  1,200/40,000  loss 1  1:56:40 left"
    assert bar_line(39, "couple", 1, 9, "", None, 309).endswith("1/9  5:09 left in all")


def test_times_are_read_as_on_a_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3600 + 62, -3)] == ["0:00", "1:00", "1:01:02", "0:00"]


def test_the_end_of_a_stage_is_one_line_or_as_many_as_fit() -> None:
    whole = "  4/7 couple: 44 s, 45 MiB, loss 0.693 -> 0.211, validation accuracy 0.500"
    assert ended(None, "  4/7 couple", MARKER) == [whole]
    narrow = ended(40, "  4/7 couple", MARKER)
    assert narrow == [
        "  4/7 couple: 44 s, 45 MiB", "      loss 0.693 -> 0.211", "      validation accuracy 0.500",
    ]  # fmt: skip
    none = {**MARKER, "facts": {"loss_first": None, "loss_last": None}}
    assert ended(None, "  couple", none) == ["  couple: 44 s, 45 MiB"]
    scored = {**MARKER, "facts": {"large_plugged": {"metrics": {"accuracy": 0.25}}}}
    assert ended(None, "  evaluate", scored)[0].endswith("large, plugged: 0.250")


def test_the_time_left_follows_from_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(job_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(job_module, "read_marker", lambda _folder: {"seconds": 10.0, "facts": {}, "peak_bytes": 0})
    shown = Job(quiet=True)
    assert shown.seconds_left() is None
    shown.follow(tmp_path, {"tune": 10, "couple": 40, "evaluate": 50})
    shown.announce("tune", "skipped")
    assert shown.seconds_left() == pytest.approx(90)  # a second for each of the other 90
    shown.announce("couple", "running")
    shown.share, now = 0.5, 140.0
    assert shown.seconds_left() == pytest.approx(50 / 30 * 70)
    shown.end("couple")
    assert shown.seconds_left() == pytest.approx(20 / 50 * 50)


def test_stages_are_numbered_and_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_module, "read_marker", lambda _folder: MARKER)
    shown = Job(quiet=False)
    shown.follow(tmp_path, {"tune": 1, "couple": 1})
    shown.announce("tune", "skipped")
    shown.announce("couple", "running")
    with shown.bar("couple", 10) as advance:
        advance(10, "loss 1")
    shown.end("couple")
    assert capsys.readouterr().err.splitlines() == [
        "  1/2 tune: done before, skipped", "  2/2 couple",
        "  2/2 couple: 44 s, 45 MiB, loss 0.693 -> 0.211, validation accuracy 0.500",
    ]  # fmt: skip


def test_what_is_logged_stands_below_the_line_that_it_belongs_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_module, "read_marker", lambda _folder: MARKER)
    monkeypatch.setattr(terminal._said, "indent", 0)
    log_here(quiet=False)
    log = logging.getLogger("plugbridge.x").info
    log("asking")
    terminal.say("run", quiet=False)
    log("of the rows")
    shown = Job(quiet=False)
    shown.follow(tmp_path, {"couple": 1})
    shown.announce("couple", "running")
    log("step 0")
    shown.end("couple")
    log("after it")
    begun = announcer(quiet=False)
    begun("rank=1", "running")
    log("step 0")
    begun("rank=1", "loss is nan")
    assert [line for line in capsys.readouterr().err.splitlines() if not line.startswith("plugbridge")] == [
        "asking", "  loading libraries and models …", "  of the rows", "  couple", "      step 0",
        "  couple: 44 s, 45 MiB, loss 0.693 -> 0.211, validation accuracy 0.500", "  after it", "  rank=1",
        "      step 0", "      loss is nan",
    ]  # fmt: skip


def test_where_nothing_is_said_what_is_logged_stands_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal._said, "indent", 0)
    log_here(quiet=True)
    terminal.say("run", quiet=True)
    Job(quiet=True, root=tmp_path).announce("couple", "running")
    announcer(quiet=True)("rank=1", "running")
    logging.getLogger("plugbridge.x").warning("careful")
    assert capsys.readouterr().err == "careful\n"


def test_the_loss_says_where_it_goes() -> None:
    assert trend([2.0]) == "loss 2"
    assert trend([2.0, 1.0]) == "loss 1 ↓"
    assert trend([1.0, 2.0]) == "loss 2 ↑"
    assert trend([1.0] * 100) == "loss 1 →"
    assert trend([9.0] * 60 + [1.0] * 40) == "loss 1 →"  # the last twenty beside the twenty before


def test_the_root_logger_is_nobody_s_but_the_user_s(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    log_here(quiet=False)
    log_here(quiet=False)
    assert (root.handlers, root.level) == (before, level)
    logging.getLogger("plugbridge.x").info("said once")
    log_here(quiet=True)
    logging.getLogger("plugbridge.x").info("not said")
    logging.getLogger("another").warning("theirs")
    assert capsys.readouterr().err.count("said once") == 1
