"""What stands on the command line and can be no path, amount or name is one line, before anything is done."""

import os
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.models import ArgumentInfo

from plugbridge.cli import main
from plugbridge.cli.application import app
from plugbridge.cli.bench import bench_app
from plugbridge.errors import ConfigError

LONG = "a" * 5000
CONFIG = "small: a\nlarge: b\ntask: rte\n"


def told(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["plugbridge", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 2100
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", LONG], "can be no path: File name too long"),
        (["run", "c.yaml", "--out=~nosuchuser/x"], "error: --out: '~nosuchuser/x' can be no path: Could not determine"),
        (["run", "c.yaml", "--set", "small=~nosuchuser/x"], "error: small: '~nosuchuser/x' can be no path"),
        (["run", "c.yaml", "--set", "large.path=~nosuchuser/x"], "error: large: '~nosuchuser/x' can be no path"),
        (["run", "c.yaml", "--set", "data=~nosuchuser/x"], "error: data: '~nosuchuser/x' can be no path"),
        (["run", "c.yaml", "--data", LONG], "can be no path: File name too long"),
        (["tune", "c.yaml", "--out", LONG], "can be no path: File name too long"),
        (["report", LONG], "can be no path: File name too long"),
        (["submit", "run", "--out", LONG], "can be no path: File name too long"),
        (["sweep", "c.yaml", "--out", LONG, "--vary", "seed=1,2"], "can be no path: File name too long"),
        (["bench", "quality", LONG], "can be no path: File name too long"),
        (["bench", "memory", "--table", LONG], "can be no path: File name too long"),
        (["reproduce", "table1", "--table", LONG], "can be no path: File name too long"),
        (["run", "c.yaml", "--set", f"task={LONG[:4000]}"], "error: "),
        (["run", "c.yaml", "--set", f"method.name={LONG[:4000]}"], "error: no method "),
        (["run", "pipe"], "cannot read config pipe: it is a pipe, not a file"),
        (["plan", "c.yaml", "--memory", "9" * 400 + "GB"], "is no amount of memory; expected one such as 8GB"),
        (["bench", "memory", "--budget", "0.0000000000001"], "is no amount of memory; expected one such as 8GB"),
        (["reproduce", LONG], "error: no table "),
        (["run", "c.yaml", "--out", ""], "an empty path names nothing; give one, such as . for this directory"),
        (["report", "."], "is not a run; expected a directory made by `plugbridge run`"),
        (["bench", "memory", "--out", "c.yaml"], "c.yaml is a file; a page needs a folder"),
        (["bench", "memory", "--table", "/proc/x/x.md"], "cannot write /proc/x: "),
        (["reproduce", "table1", "--demo", "--out", "c.yaml"], "c.yaml is a file; a page needs a folder"),
        (["reproduce", "table1", "--demo", "--table", "t.md", "--out", "c.yaml"], "c.yaml is a file; --out must name"),
        (["run", "demo", "--out", "/proc/x"], "cannot write /proc/x: "),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_it_is_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG, encoding="utf-8")
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    os.mkfifo("pipe")
    before = sorted(tmp_path.rglob("*"))
    assert message in told(words, monkeypatch, capfd)
    assert sorted(tmp_path.rglob("*")) == before


def test_whatever_takes_a_path_names_itself() -> None:
    """And expands `~`, which shells leave in `--out=~/run`."""
    found: set[str] = set()
    for command in (*app.registered_commands, *bench_app.registered_commands):
        assert command.callback is not None
        for key, kind in get_type_hints(command.callback, include_extras=True).items():
            if "Path" not in str(kind) and key not in ("small", "large"):
                continue
            option = get_args(kind)[-1]
            named = next(
                (name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)), None
            )
            name = named or (key if isinstance(option, ArgumentInfo) else f"--{key}")
            with pytest.raises(ConfigError, match=rf"^{name}\b.*: '~nosuchuser/x' can be no path"):
                option.parser("~nosuchuser/x")
            assert str(option.parser("~/x")) == str(Path.home() / "x")
            found.add(name)
    assert found == {"config", "root", "grid", "ways", "--out", "--data", "--table", "--tests", "--small", "--large"}


def test_a_home_directory_is_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A shell leaves the ~ of `--out=~/run` alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    said = told(["run", "~/c.yaml", "--out=~/file"], monkeypatch, capfd)
    assert said == f"error: {tmp_path}/file is a file; --out must name a run directory\n"
