"""A command whose output cannot be written says so in a line, or ends quietly where nobody reads; no traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from plugbridge.cli import main
from plugbridge.cli.streams import GONE, OutputError, standard_streams

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")


def broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def run(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, **streams: TextIO | None) -> int:
    monkeypatch.setattr(sys, "argv", ["plugbridge", *words])
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    assert isinstance(code, int)
    return code


COMMANDS = [
    ("methods",),
    ("methods", "--json"),
    ("explain",),
    ("explain", "--markdown"),
    ("--version",),
    ("run", "--help"),
]


@needs_full
@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_device_is_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with FULL.open("w") as full:
        assert run(words, monkeypatch, stdout=full) == 2
    said = capfd.readouterr().err
    assert said == "error: cannot write standard output: No space left on device; send it elsewhere\n"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_reader_that_has_gone_needs_no_message(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with broken_pipe() as pipe:
        assert run(words, monkeypatch, stdout=pipe) == GONE
    assert capfd.readouterr().err == ""


@needs_full
@pytest.mark.parametrize("open_stream", [broken_pipe, lambda: FULL.open("w"), lambda: None])
def test_what_cannot_be_said_on_standard_error_ends_nothing(
    open_stream: Callable[[], TextIO | None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = open_stream()
    assert run(("methods",), monkeypatch, stderr=stream) == 0
    assert "lora" in capfd.readouterr().out
    assert run(("report", "gone"), monkeypatch, stderr=stream) == 2
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or closing it fails
        stream.close()


def test_closed_files_are_not_taken_by_others(tmp_path: Path) -> None:
    """The next file that is opened would get what libraries print."""
    words = [sys.executable, "-m", "plugbridge", "methods"]
    done = subprocess.run(f"{' '.join(words)} >&-", shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: standard output is closed; send it to a file, or to /dev/null\n",
    )  # fmt: skip
    code = (
        "from plugbridge.cli.streams import standard_streams\n"
        "with standard_streams():\n"
        f"    print(open({str(tmp_path / 'file')!r}, 'w').fileno())"
    )
    done = subprocess.run(
        f"{sys.executable} -c \"$CODE\" <&- 2>&-", shell=True, capture_output=True, text=True, check=True,
        env={**os.environ, "CODE": code},
    )  # fmt: skip
    assert int(done.stdout) > 2


def test_any_character_can_be_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a file name that is no text, and on a terminal that knows ASCII only."""
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with standard_streams():
            print("ä\udcff")
    assert (tmp_path / "out").read_text() == "\\xe4\\udcff\n"


def test_a_stream_that_is_closed_meanwhile_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = (tmp_path / "out").open("w")
    monkeypatch.setattr(sys, "stdout", stream)

    def lose() -> None:
        with standard_streams():
            stream.close()
            print("x")

    with pytest.raises(OutputError, match="cannot write standard output: I/O operation on closed file"):
        lose()
