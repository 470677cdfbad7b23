"""Rows from files, one reader per file format: where a row stands, and its fields by name.

Reading is strict: the first bad line is refused by file and line number.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from plugbridge.errors import DataError
from plugbridge.parsing import parse_json, read_bytes

Encoding = Literal["utf-8", "utf-8-sig", "latin-1", "cp1252"]


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Jsonl(_Format):
    """One JSON object a line, in UTF-8, without NaN and without a key twice; blank lines are passed over."""

    name: Literal["jsonl"] = "jsonl"


class Tsv(_Format):
    """One row a line, its `columns` between tabs; a quote is a letter like any other (GLUE's files).

    A `header`, where there is one, must be the columns word for word. Only the columns in `blank` may be empty.
    """

    name: Literal["tsv"]
    columns: tuple[str, ...] = Field(min_length=1)
    header: bool = True
    encoding: Encoding = "utf-8"
    blank: tuple[str, ...] = Field(default=(), exclude=True)  # what is refused changes no result


class Csv(_Format):
    """RFC 4180: `columns` between `separator`s; a quoted field may hold separators, doubled quotes and line breaks.

    A `header`, where there is one, must be the columns word for word; with `bare` a file may do without.
    """

    name: Literal["csv"]
    columns: tuple[str, ...] = Field(min_length=1)
    separator: str = Field(default=",", min_length=1, max_length=1)
    header: bool = True
    bare: bool = Field(default=False, exclude=True)  # the rows are the same
    encoding: Encoding = "utf-8"


class LabelledLines(_Format):
    """Two `columns` a line: a label without spaces, one space, and the text up to the line's end; no header."""

    name: Literal["labelled lines"]
    columns: tuple[str, str]
    encoding: Encoding = "utf-8"


class ParallelLines(_Format):
    """One row a line over several files of equal length: `columns` is the file's stem by field, the suffix is shared.

    A task names the file of the first column.
    """

    name: Literal["parallel lines"]
    columns: dict[str, str] = Field(min_length=1)
    encoding: Encoding = "utf-8"


Format = Annotated[Jsonl | Tsv | Csv | LabelledLines | ParallelLines, Field(discriminator="name")]


def parts_of(path: Path, form: Format) -> list[Path]:
    """The files that a row is read from, `path` the first."""
    if not isinstance(form, ParallelLines):
        return [path]
    return [path, *(path.with_name(stem + path.suffix) for stem in list(form.columns.values())[1:])]


def read_rows(path: Path, form: Format) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields by name) of every row, by the reader of its format. Raises DataError on the first bad line."""
    match form:
        case Jsonl():
            return read_jsonl(path)
        case Tsv():
            return read_tsv(path, form)
        case Csv():
            return read_csv(path, form)
        case LabelledLines():
            return read_labelled_lines(path, form)
        case ParallelLines():
            return read_parallel_lines(path, form)


def read_jsonl(path: Path, what: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every non-empty line of a file, which is `what` to its reader.

    Raises DataError on the first bad line.
    """
    for where, line in _lines(path, "utf-8", what):
        if not line.strip():
            continue
        value = parse_json(line, where, DataError)
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
        yield where, cast(dict[str, Any], value)


def read_tsv(path: Path, form: Tsv) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, text by column) of every line. Raises DataError on the first bad line."""
    cells = ((where, line.split("\t")) for where, line in _lines(path, form.encoding))
    return _named(path, form.columns, form.header, cells, form.blank)


def read_csv(path: Path, form: Csv) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:first line, text by column) of every record. Raises DataError on the first bad one."""
    return _named(path, form.columns, form.header, _records(path, form), bare=form.bare)


def read_labelled_lines(path: Path, form: LabelledLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, label and text) of every line. Raises DataError on the first bad line."""
    cells = ((where, line.split(" ", 1)) for where, line in _lines(path, form.encoding))
    return _named(path, form.columns, False, cells)


def read_parallel_lines(path: Path, form: ParallelLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """(first file:line, text by column) of every line. Raises DataError for files of unequal length."""
    parts = [list(_lines(part, form.encoding)) for part in parts_of(path, form)]
    for part, lines in zip(parts_of(path, form), parts, strict=True):
        if len(lines) != len(parts[0]):
            raise DataError(f"{part}:{len(lines)}: the file ends here; expected {len(parts[0])} lines, as in {path}")
    cells = ((row[0][0], [line for _, line in row]) for row in zip(*parts, strict=True))
    return _named(path, list(form.columns), False, cells)


def _named(
    path: Path,
    columns: Sequence[str],
    header: bool,
    cells: Iterable[tuple[str, list[str]]],
    blank: Sequence[str] = (),
    bare: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells by column, less the blanks around them; an empty cell is as bad as a missing one, but for `blank`."""
    found = iter(cells)
    if header:
        where, names = next(found, (f"{path}:1", []))
        if names != list(columns):
            if not bare:
                raise DataError(f"{where}: the header is {_shown(names)}; expected {_shown(columns)}")
            found = chain([(where, names)], found)
    for where, values in found:
        texts = [value.strip() for value in values]
        if not any(texts):
            raise DataError(f"{where}: the line is empty; expected {_shown(columns)}")
        if len(texts) != len(columns):
            raise DataError(f"{where}: the line has {len(texts)} of {len(columns)} columns; expected {_shown(columns)}")
        row = dict(zip(columns, texts, strict=True))
        empty = next((name for name, text in row.items() if not text and name not in blank), None)
        if empty is not None:
            raise DataError(f"{where}: column '{empty}' is empty")
        yield where, row


def _shown(names: Sequence[str]) -> str:
    text = ", ".join(names) or "empty"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _records(path: Path, form: Csv) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(io.StringIO(_text(path, form.encoding)), delimiter=form.separator, strict=True)
    while True:
        where = f"{path}:{reader.line_num + 1}"  # a quoted field may go on for many lines: the first names the record
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}: not CSV ({error})") from error
        if values is None:
            return
        yield where, values


def _lines(path: Path, encoding: Encoding, what: str = "") -> Iterator[tuple[str, str]]:
    """(file:line, line). Only line feeds end a line: `str.splitlines` would cut texts at U+0085 and U+2028."""
    lines = _text(path, encoding, what).split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", line


def _text(path: Path, encoding: Encoding, what: str = "") -> str:
    """A whole file without its byte order mark, and with every line end made a line feed.

    Raises DataError naming the line of a bad byte.
    """
    raw = read_bytes(path, DataError, what)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not {encoding.upper()} text (byte {error.start} of the file)") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
