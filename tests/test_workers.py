"""Processes that work for another one."""

import logging
import subprocess
import sys
import time
from pathlib import Path

from plugbridge.workers import NOISY, workers


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
