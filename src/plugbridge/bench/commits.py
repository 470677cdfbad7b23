"""The commits of the models that results were made of, as far as they are from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugbridge.markers import COMMIT, read_marker


def commits_of_run(root: Path) -> dict[str, str]:
    """The commits of a finished run's models, by size."""
    marker = read_marker(root / "evaluate")
    depends: dict[str, Any] = {} if marker is None else marker["depends"]
    found = {size: depends.get(size, {}).get("commit") for size in ("small", "large")}
    return {size: commit for size, commit in found.items() if commit is not None}


def commits_said(commits: Mapping[str, str]) -> str:
    """Commits in words, short as people look them up; empty where there are none."""
    return ", ".join(f"{size} at {commit[:COMMIT]}" for size, commit in commits.items())
