"""The user's own rows: jsonl files with a prompt and label words from the configuration."""

from pathlib import Path
from typing import Any

import numpy as np

from plugbridge.errors import DataError
from plugbridge.tasks.read import read_jsonl
from plugbridge.tasks.rows import Row, make_row
from plugbridge.tasks.spec import Split, Task, parse_task

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("validation", 0.1), ("test", 0.1))


def own_task(config: Any) -> Task:
    """A task from a run's `task:` table (`config.TaskConfig`). Raises ConfigError."""
    return parse_task(
        {
            "name": "own",
            "title": "own rows",
            "source": "the user's files",
            "licence": "the user's",
            "folder": "",
            "files": {},
            "label": config.label,
            "passage": config.passage,
            "metrics": ["accuracy", "macro_f1"],
            "causal": {"prompt": config.prompt, "words": dict(config.words)},
        },
        "task",
    )


def own_rows(config: Any, task: Task, kind: str, seed: int) -> tuple[dict[Split, list[Row]], dict[str, Path]]:
    """Rows by split and the files they came from. Raises DataError.

    One `file` is shuffled by the seed and cut 80/10/10.
    """
    form = task.form(kind)

    def rows(path: Path) -> list[Row]:
        if not path.is_file():
            raise DataError(f"task file {path} does not exist")
        return [make_row(task, form, where, raw) for where, raw in read_jsonl(path)]

    if config.file is not None:
        path = Path(config.file)
        everything = rows(path)
        order = [int(i) for i in np.random.default_rng(seed).permutation(len(everything))]
        splits: dict[Split, list[Row]] = {}
        start = 0
        for split, share in _SHARES:
            end = len(order) if split == "test" else start + round(share * len(order))
            splits[split] = [everything[i] for i in order[start:end]]
            start = end
        paths = {"file": path}
    else:
        names: tuple[Split, ...] = ("train", "validation", "test")
        paths = {name: Path(getattr(config, name)) for name in names}
        splits = {name: rows(paths[name]) for name in names}
    for split, found in splits.items():
        if not found:
            where = paths.get(split, paths.get("file"))
            raise DataError(f"task: split '{split}' is empty ({where}); it needs at least one row")
    return splits, paths
