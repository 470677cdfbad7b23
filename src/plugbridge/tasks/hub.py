"""Rows of the Hugging Face hub, by the library `datasets`, an extra."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from plugbridge.errors import ConfigError, DataError
from plugbridge.parsing import one_line, shown
from plugbridge.sources import ask_hub
from plugbridge.tasks.rows import Row, check_id, split_rows
from plugbridge.tasks.spec import Split, Task
from plugbridge.tasks.unfold import UNFOLD, accepted, article, cloze, part

HUB = "hub"  # what to give as --data or `data:`


def from_hub(data: Path | None) -> bool:
    """Whether the data directory that was given stands for the hub."""
    return data is not None and str(data) == HUB


def hub_rows(task: Task, kind: str, seed: int) -> tuple[dict[Split, list[Row]], dict[str, str]]:
    """Rows by split, and the fingerprint of every split read. Raises ConfigError, DataError."""
    if task.hub is None:
        raise ConfigError(f"task '{task.name}' is not read from the hub; give --data DIR")
    try:
        import datasets  # pyright: ignore
    except ImportError as error:
        raise ConfigError("--data hub needs the package datasets; pip install 'plugbridge[hub]'") from error
    if not ask_hub(f"the rows of {task.hub.path}"):
        datasets.config.HF_HUB_OFFLINE = True  # which it looks up when it is imported
    places = task.hub.places
    sources = {split: f"{task.hub.path}/{name}:{theirs}" for split, (name, theirs) in places.items()}
    found: dict[Split, Any] = {}
    for split, (name, theirs) in places.items():
        try:
            found[split] = datasets.load_dataset(task.hub.path, name, split=theirs)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {sources[split]} from the hub: {one_line(error)}") from error
        except Exception as error:  # its own classes, and RuntimeError for a repository that is a script
            raise ConfigError(
                f"datasets {datasets.__version__} cannot load {sources[split]} from the hub: {one_line(error)}; "
                "try another version of datasets, or give --data DIR"
            ) from error

    def read(split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        seen: dict[str, str] = {}
        for i, raw in enumerate(found[split]):
            where = f"{sources[split]}:{i}"
            row = flat(task, cast(Mapping[str, Any], raw), where)
            if task.id is not None:
                check_id(task.id, row, where, seen)
            yield where, row

    prints = {sources[split]: str(getattr(rows, "_fingerprint", "unknown")) for split, rows in found.items()}
    return split_rows(task, kind, read, sources, seed), prints


def flat(task: Task, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A hub row as the official files' row unfolds: label by name, ids by part, WSC's pronoun marked.

    Raises DataError for a part that is missing or of the wrong kind.
    """
    row = dict(raw)
    labels = () if task.hub is None else task.hub.labels
    if labels:
        number = row.get(task.label)
        if not isinstance(number, int) or not 0 <= number < len(labels):
            raise DataError(f"{where}: label {shown(number)} is not a number below {len(labels)}")
        row[task.label] = labels[number]
    if task.unfold == "diagnostic":
        [row] = UNFOLD["diagnostic"](row, where)
    elif task.unfold == "wsc":
        [row] = UNFOLD["wsc"]({**row, "target": row}, where)
    elif task.unfold == "record":
        row = _record(row, where)
    elif task.unfold == "multirc":
        row |= _ids(row, ("paragraph", "question"), "answer", where)
    return row


def _record(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    shared = article(part(row, "passage", str, where), _texts(row, "entities", where))
    answers = accepted(_texts(row, "answers", where), shared["entities"], where)
    return {**shared, **_ids(row, ("passage",), "query", where), "query": cloze(row, where), "answers": answers}


def _ids(row: Mapping[str, Any], outer: Sequence[str], own: str, where: str) -> dict[str, int]:
    """Ids of a nested row: `idx` is that of its innermost part."""
    ids = part(row, "idx", dict, where)
    return {**{f"{name}_idx": part(ids, name, int, where) for name in outer}, "idx": part(ids, own, int, where)}


def _texts(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = cast(list[Any], part(row, name, list, where))
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{where}: {shown(name)} holds {type(value).__name__}; expected texts")
    return values
