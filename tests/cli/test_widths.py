"""What every command prints, on terminals of 40 and 80 columns: no line is wider, and no word is broken."""

import io
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tables import FOUND
from typer.testing import CliRunner

from plugbridge.bench.sweep import Tried
from plugbridge.cli import application, bench, describe, job, plan, report, stages, sweep, terminal
from plugbridge.cli.application import app
from plugbridge.cli.job import Job, bar_line
from plugbridge.cli.terminal import Screen, say, say_command, stacked
from plugbridge.errors import ConfigError
from plugbridge.memory.rates import Rates
from plugbridge.plan.advice import Advice, Faster
from plugbridge.plan.make import Plan, PlannedStage

MODULES = (application, bench, describe, job, plan, report, stages, sweep, terminal)
HELPS = [
    [], ["bench"], ["bench", "quality"], ["bench", "memory"],
    *([name] for name in ("run", "tune", "plug", "plan", "report", "sweep", "submit", "families", "tasks", "explain",
                          "reproduce")),
]  # fmt: skip
Print = Callable[[], object]


def _plan() -> Plan:
    stage = PlannedStage("couple: start from both models' states", True, False, 12_345 * 2**20, 4e5, 10**10, 0, 1234,
                         1_234_567, False, "cached activations are at most these")  # fmt: skip
    read = replace(stage, name="reference: large_finetuned: validation (a batch)", ours=False, reference=True)
    rates = {"float32": Rates(1.23e11, 2.34e10), "bfloat16": Rates(1.23e11, 2.34e10)}
    advice = Advice(("couple.micro_batch=4", "resident=none", "prune.reduction=8"))
    quick = Faster(("couple.recompute=False",), 10**9, 0.61)
    works = [stage, replace(stage, name="evaluate (a batch)", read_bytes=10**12), read]
    return Plan(works, rates, "cpu", 2, 1_557_611_200, 512, 8 * 2**30, 2**29, advice, ("ceiling=null",), quick,
                {"large": "a" * 30})  # fmt: skip


def _job() -> None:
    shown = Job(quiet=False)
    shown.follow(Path("run"), {"tune": 1.0, "evaluate": 1.0})
    shown.announce("tune", "skipped")
    shown.announce("evaluate", "running")
    shown.end("evaluate")


def _log() -> None:
    terminal.log_here(quiet=False)
    shown = Job(quiet=False)
    shown.announce("couple", "running")
    logging.getLogger("plugbridge.x").warning(
        "step 0: the Bridge's gradient is no better than none at the first layers"
    )
    shown.end("couple")


def _sweep() -> None:
    runs = [Tried((f"couple.learning_rate=0.00{i}", "prune.channels=gradient_pca"), {"large_plugged": 0.5}, "accuracy",
                  100) for i in (1, 2)]  # fmt: skip
    terminal.out.print(sweep.sweep_table(runs, "large_plugged", None))
    terminal.out.print("a run is named the best where it answers more of the same rows right than every other")


def _error() -> None:
    with pytest.raises(SystemExit):
        application._fail(ConfigError("couple.align_samples is 3, but plug: fresh and layer_map: uniform are fitted"))


OUTPUTS: dict[str, Print] = {
    "families": lambda: describe.families(False),
    "tasks": lambda: describe.tasks(False, False),
    "methods": lambda: describe.methods(False),
    "explain": lambda: describe.explain(False),
    "report": lambda: report.print_table(FOUND),
    "plan": lambda: plan._print_plan(_plan(), Path("config.yaml"), ["couple.steps=500"]),
    "sweep": _sweep,
    "run": _job,
    "log": _log,
    "begin": lambda: say("run config.yaml -> runs/config, which is what is done here now", False),
    "error": _error,
    "command": lambda: say_command(["plugbridge run config.yaml", *["--set couple.micro_batch=4"] * 5]),
}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Print, int], str]:
    """What is printed on a terminal so wide."""
    marker: dict[str, Any] = {"seconds": 44.4, "peak_bytes": 45 * 2**20,
                              "facts": {"loss_first": 0.69, "loss_last": 0.21}}  # fmt: skip
    monkeypatch.setattr(job, "read_marker", lambda _folder: marker)

    def run(what: Print, width: int) -> str:
        screen = Screen(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        for module in MODULES:
            for name in ("out", "err"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, screen)
        what()
        file = screen.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    return run


def _words(text: str) -> set[str]:
    """Words, but for the lines of tables, marks around words, and paths."""
    plain = re.sub(r"[│┃━┏┓┗┛┡┩┳╇┴└┘─┬├┼┤\\]", " ", text)
    return {word.strip(":,;.") for word in plain.split() if "/" not in word}


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", OUTPUTS)
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(
    printed: Callable[[Print, int], str], name: str, width: int
) -> None:
    narrow, wide = (printed(OUTPUTS[name], columns) for columns in (width, 1000))
    assert max(map(len, narrow.splitlines())) <= width
    more = _words("accuracy a wider terminal shows parameters, too s MiB") if name == "report" else set[str]()
    assert _words(narrow) - _words(wide) - more == set()
    assert "…" not in narrow.replace("models …", "")


def test_a_logged_line_goes_on_below_itself(printed: Callable[[Print, int], str]) -> None:
    first, *logged, _end = printed(_log, 40).splitlines()
    assert first == "  couple"
    assert len(logged) > 2
    assert all(line.startswith("      ") for line in logged[:-1])


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_the_help_fits_the_terminal(words: list[str], width: int) -> None:
    narrow, wide = (
        CliRunner().invoke(app, [*words, "--help"], terminal_width=columns).output for columns in (width, 1000)
    )
    assert max(map(len, narrow.splitlines())) <= width
    assert {word for word in narrow.split() if word != "#"} <= set(wide.split())


def test_help_asks_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from plugbridge.cli.help import columns

    for width, wanted in (("40", 39), ("100", 78), ("3", 20)):
        monkeypatch.setenv("COLUMNS", width)
        assert columns() == wanted


def test_what_is_no_terminal_gets_lines_as_they_are() -> None:
    file = io.StringIO()
    Screen(width=40, file=file).print("a line " * 30)
    assert file.getvalue() == "a line " * 30 + "\n"


def test_a_command_is_one_for_the_shell(printed: Callable[[Print, int], str]) -> None:
    words = ["plugbridge run x.yaml", "--set a.b=1", "--set c.d=2", "--set e.f=3"]
    narrow = printed(lambda: say_command(words), 40)
    assert narrow.count(" \\\n") == 1
    assert " ".join(narrow.replace("\\\n", " ").split()) == " ".join(words)
    assert printed(lambda: say_command(words), 1000) == f"  {' '.join(words)}\n"


@pytest.mark.parametrize("width", range(40, 121))
def test_a_bar_fits_every_terminal(width: int) -> None:
    for title in ("tune small", "couple (ladder_delta)", "validate: tune large (ceiling)"):
        for done, total in ((0, 1), (120, 400), (12_345, 1_234_567)):
            for note in ("", "loss 0.693 ↓"):
                for left, whole in ((None, None), (40.0, None), (None, 131.0), (7_000.0, 90_000.0)):
                    line = bar_line(width - 1, title, done, total, note, left, whole)
                    assert len(line) < width
                    assert f"{done:,}/{total:,}" in line
                    shown = line[2:].partition("  ")[0]
                    assert shown == title or shown.endswith("…") or shown[0].isdecimal() or shown[0] in "━─"
                    assert not shown.endswith("…") or f"{shown[:-1]} " in f"{title} "


def test_a_stacked_table_has_every_cell() -> None:
    table = terminal.rows_table([{"name": "lora", "title": "LoRA", "none": ""}], ("name", "title", "none"))
    file = io.StringIO()
    Screen(width=40, file=file, force_terminal=True, color_system=None).print(stacked(table))
    assert file.getvalue().splitlines() == ["lora", "  title: LoRA"]
