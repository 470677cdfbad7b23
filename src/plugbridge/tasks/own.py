"""The user's own rows: jsonl files with a prompt, and how it is answered, from the configuration. Needs no torch."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from plugbridge.errors import ConfigError, DataError
from plugbridge.parsing import one_line, resolved, shown
from plugbridge.tasks.form import template_fields
from plugbridge.tasks.metrics import LABEL_METRICS, OPTION_METRICS, TEXT_METRICS
from plugbridge.tasks.read import read_jsonl
from plugbridge.tasks.rows import Row, check_alike, check_id, make_row
from plugbridge.tasks.spec import SPLITS, Split, Task, parse_task

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("validation", 0.1), ("test", 0.1))


def own_task(config: Any) -> Task:
    """A task from a run's `task:` table (`config.TaskConfig`). Raises ConfigError, also for a useless prompt."""
    _check_prompt(config)
    if config.words is not None:
        metrics, answer = ["accuracy", "macro_f1"], {"words": dict(config.words), "score": config.score}
        known = LABEL_METRICS if len(config.words) == 2 else LABEL_METRICS - {"f1"}
    elif config.options is not None:
        metrics, known = ["accuracy"], OPTION_METRICS
        answer = {"options_from": config.options, "option": config.option, "score": config.score}
    else:
        metrics = ["exact_match", "token_f1"]
        answer = {"generate": config.generate, "max_new_tokens": config.max_new_tokens}
        known = TEXT_METRICS
    for name in config.metrics or ():
        if name not in known:
            raise ConfigError(f"task: no metric {shown(name)} for such answers; known: {', '.join(sorted(known))}")
    return parse_task(
        {
            "name": "own",
            "title": "own rows",
            "source": "the user's files",
            "licence": "the user's",
            "folder": "",
            "files": {},
            "label": config.label,
            "id": config.id,
            "passage": config.passage,
            "metrics": config.metrics or metrics,
            "causal": {"prompt": config.prompt, **answer},
        },
        "task",
    )


def _check_prompt(config: Any) -> None:
    fields = template_fields(config.prompt)
    if not fields:
        raise ConfigError(
            f"task.prompt is {shown(config.prompt)}, without a field, so all rows would be alike; put a field of the "
            "rows in braces, such as {text}"
        )
    if config.label in fields:
        raise ConfigError(
            f"task.prompt has the label in it, {{{one_line(config.label, 80)}}}: the model would be told the answer"
        )
    if config.passage is not None and config.passage not in fields:
        raise ConfigError(
            f"task.passage is {shown(config.passage)}, which task.prompt does not name; only a part of the prompt can "
            "be cut"
        )


def own_rows(config: Any, task: Task, kind: str, seed: int) -> tuple[dict[Split, list[Row]], dict[str, Path]]:
    """Rows by split and the files they came from. Raises DataError.

    One `file` is shuffled by the seed and cut 80/10/10, rows of one prompt staying together.
    """
    form = task.form(kind)
    _check_files(config)

    def rows(path: Path) -> list[Row]:
        seen: dict[str, str] = {}
        found: list[Row] = []
        for where, raw in read_jsonl(path, "task file"):
            if task.id is not None:
                check_id(task.id, raw, where, seen)
            found.append(make_row(task, form, where, raw))
        return found

    if config.file is not None:
        path = Path(config.file)
        found = rows(path)
        _check_enough(found, path)
        return split_by_prompt(found, seed), {"file": path}
    paths: dict[str, Path] = {name: Path(getattr(config, name)) for name in SPLITS}
    splits: dict[Split, list[Row]] = {name: rows(paths[name]) for name in SPLITS}
    for split, found in splits.items():
        if not found:
            raise DataError(f"task: split '{split}' is empty ({paths[split]}); it needs at least one row")
    return splits, paths


def _check_enough(rows: Sequence[Row], path: Path) -> None:
    """Refuse rows of which no three splits can be made. Raises DataError."""
    check_alike("own", rows, f"rows of {path}")
    prompts = len({row.prompt for row in rows})
    if prompts >= 3:
        return
    told = f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    if 0 < prompts < len(rows):
        told += f" of {prompts} prompt{'s' * (prompts != 1)}, and rows of one prompt stay in one split"
    raise DataError(
        f"task: {path} has {told}; training, validation and test need a prompt each: add rows, or name a file for each"
    )


def _check_files(config: Any) -> None:
    """Refuse two splits of one file."""
    seen: dict[Path, str] = {}
    for split in SPLITS:
        if (path := getattr(config, split)) is None:
            continue
        place = resolved(Path(path))
        if place in seen:
            raise ConfigError(
                f"task: {seen[place]} and {split} are the same file, {path}; a score on rows that were trained or "
                "chosen on says nothing: give a file each, or one `file` to be split"
            )
        seen[place] = split


def split_by_prompt(rows: Sequence[Row], seed: int) -> dict[Split, list[Row]]:
    """Rows in the order of a seeded permutation, cut 80/10/10; all rows of one prompt go where the first of them goes.

    So no prompt of a test row is trained on. A prompt of more rows than the validation split is to have is trained on;
    of the others a third is, too, where such prompts have more rows than training was to have. With three prompts no
    split is empty. Without such rows, the shares are exact.
    """
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(rows))]
    together: dict[str, list[int]] = {}
    for i in order:
        together.setdefault(rows[i].prompt, []).append(i)
    shares = {split: round(share * len(rows)) for split, share in _SHARES}
    large, small = _large_ones(list(together.values()), shares["validation"])
    left = sum(map(len, small))
    trained = max(left - (len(rows) - shares["train"]), left // 3) if large else shares["train"]
    rest = (left - trained) // 2 if large else shares["validation"]
    first = max(0 if large else 1, min(_count_until(small, trained), len(small) - 2))
    second = max(first + 1, min(_count_until(small, trained + rest), len(small) - 1))
    parts = (*large, *small[:first]), small[first:second], small[second:]
    return {split: [rows[i] for group in part for i in group] for (split, _), part in zip(_SHARES, parts, strict=True)}


def _large_ones(groups: list[list[int]], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of more than so many rows, and the others, both in their order; two at least are among the others."""
    spared = sorted(range(len(groups)), key=lambda k: len(groups[k]))[:2]
    large = [k for k, group in enumerate(groups) if len(group) > max(1, most) and k not in spared]
    return [groups[k] for k in large], [group for k, group in enumerate(groups) if k not in large]


def _count_until(groups: Sequence[Sequence[int]], rows: int) -> int:
    """How many groups, one after another, begin before so many rows are there."""
    ends = accumulate(map(len, groups), initial=0)
    return sum(start < rows for start in list(ends)[:-1])
