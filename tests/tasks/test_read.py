"""Every file format: what its reader yields, and what it refuses by file and line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugbridge.errors import DataError
from plugbridge.tasks.read import Csv, Format, Jsonl, LabelledLines, ParallelLines, Tsv, parts_of, read_jsonl, read_rows

TSV = Tsv(name="tsv", columns=("text", "label"))
CSV = Csv(name="csv", columns=("label", "title", "text"))
LINES = LabelledLines(name="labelled lines", columns=("label", "text"))


def read(tmp_path: Path, form: Format, content: str | bytes) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a file with this content, each with the name of the file and its line."""
    path = tmp_path / "rows"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(where.removeprefix(f"{tmp_path}/"), row) for where, row in read_rows(path, form)]


def test_jsonl_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \r\n{"a": "\u2028"}', encoding="utf-8")
    rows = [(f"{tmp_path}/a.jsonl:1", {"a": 1}), (f"{tmp_path}/a.jsonl:4", {"a": "\u2028"})]
    assert list(read_jsonl(tmp_path / "a.jsonl")) == rows
    assert list(read_rows(tmp_path / "a.jsonl", Jsonl())) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_tsv(tmp_path: Path, end: str, last: bool) -> None:
    lines = ["text\tlabel", 'a "b , c \t1', '"d\t0', "\x85 e\u2028f\t1"]
    assert read(tmp_path, TSV, end.join(lines) + end * last) == [
        ("rows:2", {"text": 'a "b , c', "label": "1"}),
        ("rows:3", {"text": '"d', "label": "0"}),
        ("rows:4", {"text": "e\u2028f", "label": "1"}),
    ]


def test_tsv_without_a_header(tmp_path: Path) -> None:
    form = Tsv(name="tsv", columns=("text", "label"), header=False)
    assert read(tmp_path, form, "text\tlabel\n") == [("rows:1", {"text": "text", "label": "label"})]
    assert read(tmp_path, form, "") == []


def test_csv(tmp_path: Path) -> None:
    content = 'label,title,text\n1,a,"b, ""c"""\n2,"d\n\ne",f\\\r\n3, g ,h\x85i\n'
    assert read(tmp_path, CSV, content) == [
        ("rows:2", {"label": "1", "title": "a", "text": 'b, "c"'}),
        ("rows:3", {"label": "2", "title": "d\n\ne", "text": "f\\"}),  # a record is where it begins
        ("rows:6", {"label": "3", "title": "g", "text": "h\x85i"}),
    ]


def test_csv_may_do_without_its_header(tmp_path: Path) -> None:
    form = Csv(name="csv", columns=("label", "title", "text"), bare=True)
    rows = '"1","a","b, ""c"""\n"2","d","e"\n'
    bare, headed = read(tmp_path, form, rows), read(tmp_path, form, f"label,title,text\n{rows}")
    assert [where for where, _ in bare] == ["rows:1", "rows:2"]
    assert [row for _, row in bare] == [row for _, row in headed]
    assert bare[0][1] == {"label": "1", "title": "a", "text": 'b, "c"'}
    with pytest.raises(DataError, match=r"rows:1: the line has 2 of 3 columns; expected label, title, text$"):
        read(tmp_path, form, "label,text\n1,a\n")


def test_csv_between_tabs(tmp_path: Path) -> None:
    form = Csv(name="csv", separator="\t", columns=("text", "label"), header=False)
    assert read(tmp_path, form, '"a ""b"""\t1\nc, d\t2') == [
        ("rows:1", {"text": 'a "b"', "label": "1"}),
        ("rows:2", {"text": "c, d", "label": "2"}),
    ]


def test_labelled_lines(tmp_path: Path) -> None:
    assert read(tmp_path, LINES, '0 a\tb " c , \n1  d\n') == [
        ("rows:1", {"label": "0", "text": 'a\tb " c ,'}),
        ("rows:2", {"label": "1", "text": "d"}),
    ]


def test_only_blank_columns_may_be_empty(tmp_path: Path) -> None:
    form = Tsv(name="tsv", columns=("label", "mark", "text"), header=False, blank=("mark",))
    assert read(tmp_path, form, "1\t\ta\n0\t*\tb\n") == [
        ("rows:1", {"label": "1", "mark": "", "text": "a"}),
        ("rows:2", {"label": "0", "mark": "*", "text": "b"}),
    ]
    with pytest.raises(DataError, match=r"rows:1: column 'text' is empty$"):
        read(tmp_path, form, "1\t*\t \n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path, encoding: Any) -> None:
    content = b"\xef\xbb\xbftext\tlabel\na\t1\n"
    form = Tsv(name="tsv", columns=("text", "label"), encoding=encoding)
    assert (
        read(tmp_path, form, content) == read(tmp_path, form, content[3:]) == [("rows:2", {"text": "a", "label": "1"})]
    )


@pytest.mark.parametrize(
    ("form", "content"), [(Jsonl(), '{"a": "\ufeff"}\n'), (CSV, "label,title,text\n1,a,b\n"), (LINES, "0 a\n")]
)
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, form: Format, content: str) -> None:
    assert read(tmp_path, form, f"\ufeff{content}") == read(tmp_path, form, content)


PARALLEL = ParallelLines(name="parallel lines", columns={"label": "labels", "premise": "s1", "hypothesis": "s2"})


def parallel(tmp_path: Path, **texts: str) -> list[tuple[str, dict[str, Any]]]:
    for stem, text in {"labels": "a\nb\n", "s1": "x 1\ny 1 \n", "s2": "x 2\ny 2\n", **texts}.items():
        (tmp_path / f"{stem}.dev").write_text(text, encoding="utf-8")
    return list(read_rows(tmp_path / "labels.dev", PARALLEL))


def test_parallel_lines(tmp_path: Path) -> None:
    labels = tmp_path / "labels.dev"
    assert parallel(tmp_path) == [
        (f"{labels}:1", {"label": "a", "premise": "x 1", "hypothesis": "x 2"}),
        (f"{labels}:2", {"label": "b", "premise": "y 1", "hypothesis": "y 2"}),
    ]
    assert parts_of(labels, PARALLEL) == [labels, tmp_path / "s1.dev", tmp_path / "s2.dev"]
    assert parts_of(labels, TSV) == [labels]


def test_bad_parallel_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s2\.dev:1: the file ends here; expected 2 lines, as in .*labels\.dev$"):
        parallel(tmp_path, s2="x 2\n")
    with pytest.raises(DataError, match=r"labels\.dev:2: column 'hypothesis' is empty$"):
        parallel(tmp_path, s2="x 2\n \n")
    (tmp_path / "s1.dev").unlink()
    with pytest.raises(DataError, match=r"^cannot read .*/s1\.dev: No such file or directory$"):
        list(read_rows(tmp_path / "labels.dev", PARALLEL))


@pytest.mark.parametrize(
    ("encoding", "byte", "text"), [("utf-8", b"\xc3\xa9", "é"), ("latin-1", b"\xe9", "é"), ("cp1252", b"\x85", "…")]
)
def test_encodings(tmp_path: Path, encoding: Any, byte: bytes, text: str) -> None:
    found: dict[str, Any] = {"label": "0", "text": f"caf{text}"}
    form = LabelledLines(name="labelled lines", columns=("label", "text"), encoding=encoding)
    assert read(tmp_path, form, b"0 caf" + byte) == [("rows:1", found)]
    form = Tsv(name="tsv", columns=("label", "text"), header=False, encoding=encoding)
    assert read(tmp_path, form, b"0\tcaf" + byte) == [("rows:1", found)]
    form = Csv(name="csv", columns=("label", "text"), header=False, encoding=encoding)
    assert read(tmp_path, form, b"0,caf" + byte) == [("rows:1", found)]


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        (Jsonl(), '{"a": 1}\n{"a"', "rows:2: not JSON"),
        (Jsonl(), '{"a": 1}\n\n[1]', "rows:3: expected a JSON object, found list"),
        (Jsonl(), b'{"a": 1}\n{"a": "\xff"}', "rows:2: not UTF-8 text (byte 16 of the file)"),
        (TSV, "", "rows:1: the header is empty; expected text, label"),
        (TSV, "label\ttext\na\t1", "rows:1: the header is label, text; expected text, label"),
        (TSV, "x" * 200 + "\n", f"rows:1: the header is {'x' * 80}…; expected text, label"),
        (TSV, "text\tlabel\na\t1\nb", "rows:3: the line has 1 of 2 columns; expected text, label"),
        (TSV, "text\tlabel\na\t1\t2", "rows:2: the line has 3 of 2 columns; expected text, label"),
        (TSV, "text\tlabel\na\t1\n\nb\t1", "rows:3: the line is empty; expected text, label"),
        (TSV, "text\tlabel\na\t1\n\n", "rows:3: the line is empty; expected text, label"),
        (TSV, "text\tlabel\n \t1", "rows:2: column 'text' is empty"),
        (TSV, b"text\tlabel\na\t1\n\xe9\t1", "rows:3: not UTF-8 text (byte 15 of the file)"),
        (CSV, "", "rows:1: the header is empty; expected label, title, text"),
        (CSV, "1,a,b\n", "rows:1: the header is 1, a, b; expected label, title, text"),
        (CSV, 'label,title,text\n1,"a\nb",c\n2,d\n', "rows:4: the line has 2 of 3 columns; expected label, title"),
        (CSV, 'label,title,text\n1,a,b\n2,c,"d\ne\nf', "rows:3: not CSV (unexpected end of data)"),
        (CSV, 'label,title,text\n1,a,"b"c\n', "rows:2: not CSV (',' expected after '\"')"),
        (CSV, "label,title,text\n\n1,a,b\n", "rows:2: the line is empty; expected label, title, text"),
        (CSV, 'label,title,text\n1,"",b\n', "rows:2: column 'title' is empty"),
        (CSV, b"label,title,text\n1,a,\xe9", "rows:2: not UTF-8 text (byte 21 of the file)"),
        (LINES, "0 a\n1\n", "rows:2: the line has 1 of 2 columns; expected label, text"),
        (LINES, "0 a\n1 \n", "rows:2: column 'text' is empty"),
        (LINES, "0 a\n b\n", "rows:2: column 'label' is empty"),
        (LINES, "0 a\n\n1 b\n", "rows:2: the line is empty; expected label, text"),
        (LINES, b"0 a\n1 b\xff", "rows:2: not UTF-8 text (byte 7 of the file)"),
        (
            LabelledLines(name="labelled lines", columns=("label", "text"), encoding="cp1252"),
            b"0 a\n1 \x81",
            "rows:2: not CP1252 text (byte 6 of the file)",
        ),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path: Path, form: Format, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(f'{tmp_path}/{message}')}"):
        read(tmp_path, form, content)


@pytest.mark.parametrize("form", [Jsonl(), TSV, CSV, LINES], ids=lambda form: form.name)
def test_no_file(tmp_path: Path, form: Format) -> None:
    with pytest.raises(DataError, match=r"^cannot read .*/gone: No such file or directory$"):
        list(read_rows(tmp_path / "gone", form))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": NaN}', "rows:2: not JSON (NaN is no number of JSON)"),
        ('{"text": [-Infinity]}', "rows:2: not JSON (-Infinity is no number of JSON)"),
        ('{"text": 1e999}', "rows:2: not JSON (1e999 is too large a number)"),
        ('{"text": ' + "9" * 5000 + "}", f"{'9' * 14} is a whole number of 5,000 digits, more than are read)"),
        ('{"label": "a", "label": "b"}', "rows:2: not JSON (key 'label' stands twice in an object)"),
        ('{"a": [{"b": 1, "b": 1}]}', "key 'b' stands twice"),
        (r'{"text": "a\ud800b"}', "rows:2: not JSON (a text holds half of a surrogate pair"),
        (r'{"a": [{"\udfff": 1}]}', "half of a surrogate pair"),
        ("[" * 100_000, "rows:2: not usable JSON: more than 64 levels of brackets"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "more than 64 levels of brackets"),
        ("\ufeff{}", "rows:2: not JSON (Expecting value, column 1)"),
        ("{'a': 1}", "rows:2: not JSON (Expecting property name enclosed in double quotes, column 2)"),
        ('{"a": "b\x01"}', "rows:2: not JSON (Invalid control character"),
        ("null", "rows:2: expected a JSON object, found NoneType"),
    ],
)
def test_a_line_that_is_no_json_of_the_standard_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, Jsonl(), '{"text": "good"}\n' + line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A file's mark of its encoding, characters beyond U+FFFF in two escapes, NUL, brackets side by side."""
    many = ", ".join(["[[1]]"] * 100)
    lines = "\ufeff" + r'{"a": "\ud83d\ude00", "b": "c\u0000d", "e": 1.5e3}' + f'\n{{"many": [{many}]}}'
    (_, first), (_, second) = read(tmp_path, Jsonl(), lines)
    assert first == {"a": "😀", "b": "c\0d", "e": 1500.0}
    assert second == {"many": [[[1]]] * 100}


@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "a directory"), (os.mkfifo, "a pipe")])
def test_what_is_no_file_is_said_and_not_waited_for(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    make(tmp_path / "rows")
    for form in (Jsonl(), TSV, CSV):
        with pytest.raises(DataError, match=f"cannot read .*rows: it is {what}, not a file"):
            list(read_rows(tmp_path / "rows", form))
