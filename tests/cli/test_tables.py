"""What commands print at any width: tables, the help's lines, and a report whose pictures cannot be drawn."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from plugbridge.cli import report as report_module
from plugbridge.cli import terminal
from plugbridge.cli.application import app
from plugbridge.cli.report import draw_all, print_table
from plugbridge.cli.terminal import Screen, rows_table

METRICS = {"accuracy": 0.375}


def _row(name: str) -> dict[str, Any]:
    counts = {"trainable": 1_234_567, "changed": 1_234_567}
    return {"name": name, "metric": "accuracy", "value": 0.375, "metrics": METRICS, "n": 24, "seconds": 12.3,
            "peak_bytes": 345 * 2**20, "parameters": counts}  # fmt: skip


FOUND: dict[str, Any] = {
    "rows": [_row("small_finetuned"), _row("large_plugged")], "majority": {"accuracy": 0.25}, "split": "test",
    "task": "own", "method": "lora", "mode": "feedback", "models": {"bridge": None}, "pgr": None,
    "pgr_reason": "nothing says how far the large model can be tuned", "coupling": None, "cut": {}, "remarks": [],
    "peak": {"bytes": 2**30, "stage": "couple", "memory": "resident", "reserved_bytes": 0},
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_report_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Screen(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(report_module, "out", console)
    monkeypatch.setattr(terminal, "out", console)
    with console.capture() as captured:
        print_table(FOUND)
    printed = captured.get()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    assert "small, all weights tuned" in printed
    assert ("large, plugged\n  accuracy 0.375, 12 s, 345 MiB\n" in printed) == (width < 80)
    assert ("1,234,567" in printed) == (width == 80)


@pytest.mark.parametrize("width", [30, 40, 60])
def test_a_name_to_type_is_whole_and_nothing_is_cut(width: int) -> None:
    rows = [{"name": "wordnet-kind-long", "title": "two words", "architecture": "T5ForConditionalGeneration"}]
    console = Console(width=width, file=io.StringIO(), soft_wrap=True)
    with console.capture() as captured:
        console.print(rows_table(rows, ("name", "title", "architecture")))
    assert "wordnet-kind-long" in captured.get()
    assert "…" not in captured.get()


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"]])
def test_the_help_s_summaries_are_whole(words: list[str]) -> None:
    printed = CliRunner().invoke(app, words, terminal_width=78).output
    _, found, commands = printed.partition("Commands:\n")
    assert found
    assert "..." not in commands
    assert max(map(len, printed.splitlines())) <= 78
    assert "Completion in your shell:  plugbridge --install-completion" in commands or words[0] == "bench"


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OverflowError("no such axis")

    monkeypatch.setattr("plugbridge.report.draw", fails)
    assert draw_all(FOUND, tmp_path) == "no picture was drawn"
    said = capsys.readouterr().err
    assert said == f"warning: {tmp_path / 'report.png'} was not drawn (OverflowError: no such axis)\n"
    monkeypatch.undo()
    (tmp_path / "report.png").write_bytes(b"mine")
    assert draw_all(FOUND, tmp_path) == "no picture was drawn"
    assert "was not made by plugbridge, so it stays" in capsys.readouterr().err
    assert (tmp_path / "report.png").read_bytes() == b"mine"
