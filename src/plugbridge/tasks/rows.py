"""A task's rows: read, unfolded, put into words, held out and limited."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from plugbridge.errors import DataError
from plugbridge.parsing import one_line, require_characters, shown
from plugbridge.tasks.form import PromptForm, field_of, fill, prompt_of, template_of, text_field, text_of
from plugbridge.tasks.read import parts_of, read_rows
from plugbridge.tasks.spec import SPLITS, Split, Task
from plugbridge.tasks.unfold import SHARED, UNFOLD

TEST_SEED = 0  # draws test rows whatever the run's seed: all seeds score the same rows, and none has tuned on them
UNLABELLED = -1
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One question: text, options, the right option's position, its fields, and where it was read.

    `also` are the positions of further right options. `target` is the text that a generating model learns to write.
    The answer of a row without a label is `UNLABELLED`.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    fields: Mapping[str, Any]
    where: str
    also: tuple[int, ...] = ()
    target: str | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """Texts of all right options; none for a row without a label."""
        return () if self.answer == UNLABELLED else tuple(self.options[i] for i in (self.answer, *self.also))

    @property
    def question(self) -> tuple[str, ...]:
        """What a model is asked: its prompt, and the options that it has to choose from."""
        return (self.prompt, *self.options) if self.target is None else (self.prompt,)


def split_files(task: Task, data: Path | None) -> dict[str, Path]:
    """Paths of a task's files. Raises DataError naming what was looked for."""
    return find_files(task, data, task.files, *task.or_files)


def find_files(task: Task, data: Path | None, *layouts: Mapping[str, str]) -> dict[str, Path]:
    """Paths of the first set of files that is in a task's folder, all in one place.

    Raises DataError naming what was looked for.
    """
    if task.shipped:
        roots = [Path(str(files("plugbridge.tasks"))) / "data" / task.folder]
    elif data is None:
        raise DataError(
            f"task '{task.name}' needs its files; give --data DIR or set PLUGBRIDGE_DATA to a "
            f"directory that holds {task.folder}/{next(iter(layouts[0].values()))}"
        )
    else:
        folders = [data / task.folder, *(data / name / task.folder for name in task.within), data]
        roots = [place for folder in folders for place in (folder, *(folder / name for name in task.inside))]
    for names, root in product(layouts, roots):
        paths = {split: root / name for split, name in names.items()}
        if all(part.is_file() for path in paths.values() for part in parts_of(path, task.format)):
            return paths
    sets = ([part.name for name in names.values() for part in parts_of(Path(name), task.format)] for names in layouts)
    wanted = " or ".join(", ".join(names) for names in sets)
    others = "".join(f", nor does {root}" for root in roots[1:])
    raise DataError(f"task '{task.name}': {roots[0]} does not hold {wanted}{others}")


def input_files(task: Task, data: Path | None) -> dict[str, Path]:
    """Every file that a task reads, by split and part. Raises DataError."""
    found: dict[str, Path] = {}
    for split, path in split_files(task, data).items():
        parts = parts_of(path, task.format)
        found |= {split: path} if parts == [path] else {f"{split}:{part.name}": part for part in parts}
    return found


def read_flat(task: Task, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) of every row of a file, nested ones unfolded. Raises DataError on the first bad one."""
    seen: dict[str, str] = {}
    outer: dict[str, str] = {}
    for where, raw in read_rows(path, task.format):
        if task.unfold in SHARED:  # questions are told apart, and held out, by what they are about
            check_id("idx", raw, where, outer, SHARED[task.unfold])
        for flat in UNFOLD[task.unfold](raw, where) if task.unfold is not None else (raw,):
            if task.id is not None:
                check_id(task.id, flat, where, seen)
            yield where, flat


def check_id(name: str, raw: Mapping[str, Any], where: str, seen: dict[str, str], what: str = "row") -> None:
    """Take note of an id in `seen`. Raises DataError for one that is there already, missing, or no id."""
    field_of(raw, name, where)
    found = raw[name]
    if isinstance(found, bool) or not isinstance(found, int | str) or not str(found).strip():
        raise DataError(
            f"{where}: {one_line(name, 80)} is {one_line(json.dumps(found), 80)}; expected a whole number or a text"
        )
    value = str(found)
    require_characters(value, f"{where}: {one_line(name, 80)}", DataError)
    if value in seen:
        raise DataError(
            f"{where}: {one_line(name, 80)} {one_line(value, 80)} was that of {seen[value]} already; every {what} "
            "needs its own"
        )
    seen[value] = where


def load_rows(task: Task, kind: str, data: Path | None, seed: int) -> dict[Split, list[Row]]:
    """All rows of a task, by split; what is held out and what is left out is said at `Task`.

    SuperGLUE's and GLUE's test labels are not public, so their validation file is the test split
    here and no choice may be made on it: the validation split is held out from the train rows.
    Raises DataError.
    """
    paths = split_files(task, data)
    return split_rows(task, kind, lambda split: read_flat(task, paths[split]), {s: str(paths[s]) for s in paths}, seed)


def split_rows(
    task: Task,
    kind: str,
    read: Callable[[Split], Iterator[tuple[str, Mapping[str, Any]]]],
    sources: Mapping[str, str],
    seed: int,
) -> dict[Split, list[Row]]:
    """Rows by split from wherever `read` finds a split's; `sources` says where that is. Raises DataError."""
    form = task.form(kind)
    rows: dict[Split, list[Row]] = {}
    for split in SPLITS:
        if split in sources:
            rows[split] = [make_row(task, form, where, raw) for where, raw in read(split)]
    whole = rows.get("train", [])
    if task.holdout_test > 0:
        rows["train"], rows["test"] = hold_out(rows["train"], task.holdout_test, TEST_SEED, task.group)
    if task.holdout > 0:
        rows["train"], rows["validation"] = hold_out(rows["train"], task.holdout, seed, task.group)
    if whole and not rows["train"]:
        raise DataError(f"task '{task.name}': {sources['train']} has {_all_held_out(task, whole)}; it needs more rows")
    for split, count in task.limit.items():
        rows[split], _ = draw(rows.get(split, []), count, TEST_SEED if split == "test" else seed)
    if form.judge is not None:  # a phrase that the label denies is nothing to learn to write
        rows["train"], drawn = [r for r in rows["train"] if list(form.words or ())[r.answer] == "true"], rows["train"]
        if drawn and not rows["train"]:
            raise DataError(
                f"task '{task.name}': no train row of {sources['train']} is labelled true, and others teach nothing to "
                "write"
            )
    for split in SPLITS:
        if not rows.get(split):
            raise DataError(f"task '{task.name}': split '{split}' is empty ({sources.get(split, 'held out')})")
    return rows


def _all_held_out(task: Task, rows: Sequence[Row]) -> str:
    held = " and ".join([*["validation"] * (task.holdout > 0), *["test"] * (task.holdout_test > 0)])
    told = f"{len(rows):,} row{'s' * (len(rows) > 1)}"
    if task.group is not None:
        told += f" of {len({text_of(field_of(row.fields, task.group, row.where)) for row in rows}):,} {task.group}"
    return f"{told}, of which {held} rows are held out, and none is left to train on"


def check_alike(task: str, rows: Sequence[Row], what: str) -> None:
    """Refuse rows of which all ask the same. Raises DataError."""
    if len(rows) > 1 and len({row.question for row in rows}) == 1:
        raise DataError(
            f"task '{task}': all {len(rows):,} {what} read alike, {shown(rows[0].prompt)}; nothing can be learnt from "
            "them; is the prompt's field the right one?"
        )


def hold_out(rows: Sequence[Row], share: float, seed: int, group: str | None = None) -> tuple[list[Row], list[Row]]:
    """Rows kept and rows held out, both in their order: `share` of them, at least one, drawn by the seed.

    With `group`, rows that have the same value in that field stay together, and the share is that of the values.
    """
    if group is None:
        held, kept = draw(rows, max(1, round(share * len(rows))), seed)
        return kept, held
    keys = [text_of(field_of(row.fields, group, row.where)) for row in rows]
    values = list(dict.fromkeys(keys))
    drawn = set(draw(values, max(1, round(share * len(values))), seed)[0])
    pairs = list(zip(keys, rows, strict=True))
    return [row for key, row in pairs if key not in drawn], [row for key, row in pairs if key in drawn]


def draw(rows: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """The first `count` rows of a seeded permutation, and the others, both in their order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[int(i)] for i in sorted(order[:count])], [rows[int(i)] for i in sorted(order[count:])]


def make_row(task: Task, form: PromptForm, where: str, raw: Mapping[str, Any], labelled: bool = True) -> Row:
    """Put one row into words. Raises DataError for an unusable field, or a missing, null or unknown label.

    A row that the causal form has no prompt for is refused for every kind of model. A row that is not `labelled` is
    `UNLABELLED`, whatever its label.
    """
    prompt = prompt_of(form, raw, where, task.blank)
    template_of(task.causal, raw, where)
    label = _label(raw, task.label, where) if labelled else ""
    if form.words is not None:
        options = tuple(form.words.values())
        right = (_number_of_word(form.words, label, where),) if labelled else ()
    elif form.options is not None:
        options = tuple(fill(option, raw, where, task.blank) for option in form.options)
        right = (_number_of_option(label, len(options), where),) if labelled else ()
    elif form.options_from is not None:
        texts = texts_of(raw, form.options_from, where)
        options = tuple(fill(form.option, {**raw, "option": text}, where, task.blank) for text in texts)
        right = (
            _numbers_of_texts(texts, _right_texts(raw, task.label, form.options_from, where), where) if labelled else ()
        )
    else:
        texts = texts_of(raw, task.label, where) if labelled else ()
        options = tuple(fill(form.generate or "", {**raw, task.label: text}, where, task.blank) for text in texts)
        right = tuple(range(len(options)))
    target = None
    if form.generate is not None and labelled:
        target = fill(form.generate, raw, where, task.blank) if form.judge is not None else options[0]
    return Row(prompt, options, right[0] if right else UNLABELLED, raw, where, right[1:], target)


def _label(raw: Mapping[str, Any], name: str, where: str) -> str:
    label = field_of(raw, name, where)
    if label is None:
        raise DataError(f"{where}: field {shown(name)} is null; expected a label")
    return str(label)


def _number_of_word(words: Mapping[str, str], label: str, where: str) -> int:
    labels = list(words)
    if label not in words:
        raise DataError(f"{where}: label {shown(label)} has no label word; known labels: {one_line(', '.join(labels))}")
    return labels.index(label)


def _number_of_option(label: str, count: int, where: str) -> int:
    if not label.isdecimal() or len(label) > 9 or int(label) >= count:
        raise DataError(f"{where}: label {shown(label)} is not the number of an option (0 to {count - 1})")
    return int(label)


def _right_texts(raw: Mapping[str, Any], label: str, options: str, where: str) -> tuple[str, ...]:
    """The right options' texts: the label's, or that of the option whose number it is.

    Raises DataError for a number that is none of an option, or could as well be another option's text.
    """
    number = raw.get(label)
    if not isinstance(number, int) or isinstance(number, bool):
        return texts_of(raw, label, where)
    listed = cast(list[Any], raw[options]) if isinstance(raw[options], list) else [raw[options]]
    if not 0 <= number < len(listed):
        raise DataError(f"{where}: label {shown(number)} is not the number of an option (0 to {len(listed) - 1})")
    if str(number) in listed and listed[number] != str(number):
        raise DataError(
            f"{where}: label {shown(number)} is an option's number and another option's text; give the right option's "
            "text, in quotes"
        )
    return (str(listed[number]),)


def _numbers_of_texts(options: Sequence[str], right: Sequence[str], where: str) -> tuple[int, ...]:
    for text in right:
        if text not in options:
            raise DataError(f"{where}: answer {shown(text)} is none of the row's {len(options)} options")
    return tuple(dict.fromkeys(options.index(text) for text in right))


def texts_of(raw: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The texts of a field: a text, or a list of them, at least one and none empty."""
    value = field_of(raw, name, where)
    values = cast(list[Any], value) if isinstance(value, list) else [text_field(raw, name, where)]
    if not values:
        raise DataError(f"{where}: field {shown(name)} is an empty list; expected at least one text")
    for text in values:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: field {shown(name)} holds {shown(text)}; expected texts that are not empty")
    return tuple(dict.fromkeys(values))


def passage_of(task: Task, row: Row) -> str:
    """The text that may be cut. Raises DataError if the row has no such field."""
    assert task.passage is not None
    return text_of(field_of(row.fields, task.passage, row.where))


def refill(task: Task, form: PromptForm, row: Row, passage: str) -> str:
    """The row's prompt with another passage, which may be blank: a prompt is cut to fit, its question kept."""
    assert task.passage is not None
    return prompt_of(form, {**row.fields, task.passage: passage}, row.where, (*task.blank, task.passage))
