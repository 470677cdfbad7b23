"""Processes that work for another one."""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plugbridge.errors import RunError, TrainingDiverged
from plugbridge.workers import NOISY, apart, workers


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        "from plugbridge.workers import workers\n"
        "if __name__ == '__main__':\n"
        "    pool = workers(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(script)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert _alive(worker)
        parent.kill()
        parent.wait()
        for _ in range(300):
            if not _alive(worker):
                break
            time.sleep(0.1)
        assert not _alive(worker)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_quiet_from_the_start() -> None:
    with workers(1) as pool:
        assert pool.submit(_levels).result() == NOISY


def _levels() -> dict[str, int]:
    return {name: logging.getLogger(name).level for name in NOISY}


def test_work_apart_is_done_by_another_process() -> None:
    here = ["what a copy has"]
    assert apart(lambda: (here, os.getppid())) == (here, os.getpid())


def _fail(error: BaseException) -> None:
    raise error


class _Picky(Exception):
    """Its arguments are not those of its class: it cannot be made again elsewhere."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_errors_come_back_as_they_were_with_their_place() -> None:
    with pytest.raises(TrainingDiverged, match=r"^toy: gone$") as caught:
        apart(lambda: _fail(TrainingDiverged("toy: gone", learned=False)))
    assert not caught.value.learned
    assert "in _fail" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^_Picky: 1 and 2$"):
        apart(lambda: _fail(_Picky(1, 2)))
    with pytest.raises(KeyboardInterrupt):
        apart(lambda: _fail(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the stage was killed, by the system if memory ran out; `plugbridge plan` says"),
        (signal.SIGBUS, "the stage was ended by SIGBUS: a file that it reads was cut short"),
        (signal.SIGTERM, "the stage ended by SIGTERM; run the same command again to resume"),
    ],
)
def test_a_killed_process_is_one_line(number: signal.Signals, said: str) -> None:
    with pytest.raises(RunError) as caught:
        apart(lambda: (faulthandler.disable(), os.kill(os.getpid(), number)))  # pytest's would tell at length
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


STUBBORN = """
import os, signal, sys, time
from plugbridge import workers
workers.PATIENCE = 1
def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(600)
try:
    workers.apart(work)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_a_copy_that_does_not_listen(times: int) -> None:
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        copy = int(parent.stdout.readline())
        for _ in range(times):
            os.kill(parent.pid, signal.SIGINT)
            time.sleep(0.3)
        assert parent.wait(60) == 0
        assert parent.stdout.read() == "interrupted\n"
    assert not _alive(copy)
