"""What the rows of a run tell before any model is there: tasks that cannot work, and what is worth a line."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from plugbridge.errors import DataError
from plugbridge.parsing import shown
from plugbridge.tasks.rows import Row, check_alike
from plugbridge.tasks.spec import SPLITS, Split, Task

ODD = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
"""Characters that texts have by accident: control characters but for blanks, and what stands for undecodable bytes."""

LEAST = 0.05
"""Share of a file's rows below which a split of it is told: it was to be a tenth."""


def check_rows(task: Task, kind: str, rows: Mapping[Split, Sequence[Row]]) -> list[str]:
    """Refuse rows that nothing can be learnt from or told by; returns what else is to be said of them, a line each.

    Raises DataError where all train prompts are alike, no row has anything to choose, or two splits hold the same rows.
    """
    form = task.form(kind)
    train = rows["train"]
    check_alike(task.name, train, "train rows")
    if form.generate is None and all(len(row.options) == 1 for found in rows.values() for row in found):
        raise DataError(f"task '{task.name}': every row has one option, so there is nothing to choose")
    said = [f"every train row's answer is {shown(answer)}" for answer in _only_answer(train, form.judge is not None)]
    said += _odd_characters([row for split in SPLITS for row in rows[split]])
    said += _uneven(rows)
    for one, other in combinations(SPLITS, 2):
        left, right = ([_whole(row) for row in rows[split]] for split in (one, other))
        if left == right and len(left) > 1:
            raise DataError(
                f"task '{task.name}': {one} and {other} hold the same {len(left):,} rows; a score on rows that were "
                "trained or chosen on says nothing"
            )
        known = {row.question for row in rows[one]}
        again = sum(row.question in known for row in rows[other])
        if again:
            said.append(f"{again:,} of {len(rows[other]):,} {other} rows ask what a {one} row asks, word by word")
    return said


def _uneven(rows: Mapping[Split, Sequence[Row]]) -> list[str]:
    """That a split of one file is far from its size, as some prompts have many rows."""
    sizes = {split: len(rows[split]) for split in SPLITS}
    files = {found[0].where.rpartition(":")[0] for found in rows.values() if found}
    whole = sum(sizes.values())
    if len(files) > 1 or whole < 10 or min(sizes.values()) >= LEAST * whole:
        return []
    parts = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    return [f"rows of one prompt stay together, and some prompts have many: {parts} rows"]


def _odd_characters(rows: Sequence[Row]) -> list[str]:
    """That texts have characters which nobody writes: of broken files, or decoded as what they were not."""
    found = [(row, odd) for row in rows if (odd := ODD.search("\n".join((row.prompt, *row.options)))) is not None]
    if not found:
        return []
    row, odd = found[0]
    return [
        f"{len(found):,} of {len(rows):,} rows have control characters or U+FFFD, the first U+{ord(odd[0]):04X} at "
        f"{row.where}; models are given them as they are"
    ]


def _only_answer(rows: Sequence[Row], judged: bool) -> list[str]:
    """The answer that all rows have, if there is one; a judge's rows all have the verdict that training needs."""
    found = {row.options[row.answer].strip() for row in rows}
    return list(found) if len(found) == 1 and len(rows) > 1 and not judged else []


def _whole(row: Row) -> tuple[object, ...]:
    return row.prompt, row.options, row.answer
