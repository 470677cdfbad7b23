"""The user's own rows: jsonl files with a prompt, and label words or a text to write, from the configuration."""

from pathlib import Path
from typing import Any

import numpy as np

from plugbridge.errors import ConfigError, DataError
from plugbridge.tasks.metrics import LABEL_METRICS, TEXT_METRICS
from plugbridge.tasks.read import read_jsonl
from plugbridge.tasks.rows import Row, make_row
from plugbridge.tasks.spec import Split, Task, parse_task

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("validation", 0.1), ("test", 0.1))


def own_task(config: Any) -> Task:
    """A task from a run's `task:` table (`config.TaskConfig`). Raises ConfigError."""
    if config.words is not None:
        metrics, answer = ["accuracy", "macro_f1"], {"words": dict(config.words)}
        known = LABEL_METRICS if len(config.words) == 2 else LABEL_METRICS - {"f1"}
    else:
        metrics = ["exact_match", "token_f1"]
        answer = {"generate": config.generate, "max_new_tokens": config.max_new_tokens}
        known = TEXT_METRICS
    for name in config.metrics or ():
        if name not in known:
            raise ConfigError(f"task: no metric '{name}' for such answers; known: {', '.join(sorted(known))}")
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
            "metrics": config.metrics or metrics,
            "causal": {"prompt": config.prompt, **answer},
        },
        "task",
    )


def own_rows(config: Any, task: Task, kind: str, seed: int) -> tuple[dict[Split, list[Row]], dict[str, Path]]:
    """Rows by split and the files they came from. Raises DataError.

    One `file` is shuffled by the seed and cut 80/10/10.
    """
    form = task.form(kind)

    def rows(path: Path) -> list[Row]:
        return [make_row(task, form, where, raw) for where, raw in read_jsonl(path, "task file")]

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
