"""`plugbridge run`: all stages, and the finished run's table."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugbridge.cli.options import ConfigArg, DataOption, OutOption, QuietOption, RedoOption, SetOption
from plugbridge.cli.report import draw_all, print_loading, print_table
from plugbridge.cli.terminal import log_here, say, setup
from plugbridge.config import RunConfig, load_config
from plugbridge.embedded import config_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from plugbridge.run import StageResult


def execute_stages(
    config_path: Path,
    root: Path | None,
    data: Path | None,
    sets: list[str] | None,
    quiet: bool,
    only: str | None,
    redo: bool,
) -> Path:
    """Run all stages, or only one; the run's directory."""
    fresh = "torch" not in sys.modules  # nothing was computed yet: a copy of this process can go on
    config_path = config_file(config_path)
    log_here(quiet)
    config = load_config(config_path, tuple(sets or ()))
    root = root if root is not None else Path("runs") / config_path.stem
    from plugbridge.markers import check_places, check_root
    from plugbridge.preflight import preflight
    from plugbridge.run import check_stages, execute, locked
    from plugbridge.stages.recorded import check_recorded
    from plugbridge.transfer.needed import stages_of

    check_root(root, config_path, redo)
    check_places(root, stages_of(config) if only is None else {only})
    checked = preflight(config, data)
    check_recorded(root, checked, only, redo)
    say(f"{config_path} -> {root}", quiet)
    setup(quiet)
    from plugbridge.cli.job import Job
    from plugbridge.prepare import prepare_checked
    from plugbridge.stages.build import build_stages
    from plugbridge.stages.load import loads_of

    prepared = prepare_checked(checked)
    job = Job(quiet)
    stages = build_stages(prepared, root, job, only)
    loads = loads_of(prepared)
    job.follow(root, {stage.name: loads[stage.name] for stage in stages if only in (None, stage.name)})
    alone = fresh and sys.platform == "linux" and prepared.device == "cpu"
    if alone:
        import sklearn.metrics  # pyright: ignore  # noqa: F401  # or it would count as the memory of stages that score
    check_stages(root, stages, only, redo)  # before the run is taken over from another file
    with locked(root, config_path, redo):
        _describe(root, config)
        do = partial(_by_itself, prepared.dtype) if alone else _here
        execute(root, stages, only, job.announce, do, redo, job.end)
    return root


def _here(_stage: str, work: "Callable[[], StageResult]") -> "StageResult":
    return work()


def _by_itself(dtype: "torch.dtype", stage: str, work: "Callable[[], StageResult]") -> "StageResult":
    """Do a stage's work in a process of its own."""
    from plugbridge.memory.warm import warm_up
    from plugbridge.workers import apart

    def warmed() -> "StageResult":
        warm_up(dtype)
        return work()

    return apart(warmed, f"stage '{stage}'")


def _describe(root: Path, config: RunConfig) -> None:
    import platform

    import yaml

    from plugbridge.markers import write_own
    from plugbridge.version import versions

    write_own(root, "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
    write_own(root, "environment.json", json.dumps(environment, indent=2) + "\n")


def run(
    config: ConfigArg,
    out_dir: OutOption = None,
    data: DataOption = None,
    sets: SetOption = None,
    redo: RedoOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do the whole job: tune, score, prune, couple, plug, evaluate. Finished stages are skipped."""
    root = execute_stages(config, out_dir, data, sets, quiet, None, redo)
    _finish(root)


def _finish(root: Path) -> None:
    from plugbridge.report import read_report

    found = read_report(root)
    print_table(found)
    print_loading(found, draw_all(found, root))
