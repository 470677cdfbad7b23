"""YAML is read strictly: 1.2's scalars, no key twice, no tags, bounded; what is wrong is one line."""

import math
from typing import Any

import pytest

from plugbridge.config.document import DEEPEST, LONGEST, MOST, Plain, parse_yaml
from plugbridge.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True), ("True", True), ("FALSE", False),
        ("null", None), ("~", None), ("", None),
        ("0", 0), ("-17", -17), ("+5", 5), ("0o17", 15), ("0x1F", 31),
        ("1.5", 1.5), ("1e-3", 0.001), ("3E+2", 300.0), (".5", 0.5), ("1.", 1.0), ("-0.0", -0.0),
        *((text, text) for text in ("yes", "no", "on", "off", "y", "tRUE", "nULL", "017", "-00", "1:30", "1_000",
                                    "2024-13-45", "2024-01-01", ".inf", "-.INF", ".nan", "1e999", "0b11", "0o8", "=",
                                    "1e", "0x", "+-1", "9" * 5000, "1" * 500 + ".0")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    """Where 1.2 and 1.1 would read different numbers (017), and where there is no finite one, a scalar is a text."""
    found = parse_yaml(f"a: {written}", "c.yaml")["a"]
    assert isinstance(found, Plain)
    assert (str(found), found.value, type(found.value)) == (written, value, type(value))
    assert not isinstance(found.value, float) or math.copysign(1, found.value) == math.copysign(1, value)
    quoted = parse_yaml(f"a: '{written}'", "c.yaml")["a"]
    assert (quoted, type(quoted)) == (written, str)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("# nothing", None),
        ("\ufeffa: b", {"a": "b"}),
        ("a: |\n  b\n  c\n", {"a": "b\nc\n"}),
        ("a: &x {b: c}\nd: *x\ne: [*x]", {"a": {"b": "c"}, "d": {"b": "c"}, "e": [{"b": "c"}]}),
        (r'a: "\ud83d\ude00"', {"a": "😀"}),  # as JSON writes it
        ("true: a\n017: b\n1.0: c", {"true": "a", "017": "b", "1.0": "c"}),  # keys are texts as written
        ("'<<': a", {"<<": "a"}),
    ],
)
def test_documents(text: str, content: Any) -> None:
    assert parse_yaml(text, "c.yaml") == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "c.yaml: line 3: key 'a' stands twice, first in line 1; keep one"),
        ("a:\n  - {b: 1, c: 2,\n     b: 3}", "c.yaml: line 3: key 'b' stands twice, first in line 2"),
        ("{0: a, '0': b}", "key '0' stands twice"),
        ("a: !!float abc", "c.yaml: line 1: tag 'tag:yaml.org,2002:float'"),
        ("a: !!python/object/apply:os.system [x]", "c.yaml: line 1: tag 'tag:yaml.org,2002:python/object/apply:os"),
        ("a: ! b", "tag '!'"),
        ("%YAML 1.1\n---\na: b", "c.yaml: line 1: a % directive"),
        ("a: b\n---\na: b", "c.yaml: line 2: a second document begins"),
        ("<<: {a: 1}", "<< is not read; write out the keys"),
        ("? [a]\n: b", "a list, table or alias as a key"),
        ("&a b: 1\n*a : 2", "a list, table or alias as a key"),
        ("a: *x", "c.yaml: line 1: alias 'x' of no anchor before it"),
        ("a: &x [*x]", "alias 'x' stands inside of what it names"),
        ("a: &x 1\nb: &x 2", "c.yaml: line 2: anchor 'x' stands twice"),
        (BOMB, f"more than {MOST:,} values, those that aliases stand for counted"),
        ("[" * 3000, f"more than {DEEPEST} levels of lists and tables"),
        ("[" * 3000 + "]" * 3000, f"more than {DEEPEST} levels of lists and tables"),
        ("\n".join(" " * depth + "a:" for depth in range(100)), f"more than {DEEPEST} levels"),
        (r'a: "b\0c"', "c.yaml: line 1: 'b\\x00c' has a NUL character"),
        (r'a: "\ud800"', "has half of a surrogate pair"),
        ("a: \ud800", "c.yaml is not YAML: "),
        (r'a: "\U00110000"', "c.yaml is not YAML: "),
        ("a: b\n\tc: d", "c.yaml is not YAML: found character '\\t' that cannot start any token, line 2 column 1"),
        ("a: [", "c.yaml is not YAML: "),
        ("a: b: c", "c.yaml is not YAML: mapping values are not allowed here, line 1 column 5"),
        ("a: 'b", "c.yaml is not YAML: "),
        ("x" * (LONGEST + 1), f"c.yaml: 262,145 characters; {LONGEST:,} are read at most"),
        ("? " + "k" * 5000 + "\n: 1\n? " + "k" * 5000 + "\n: 2", "stands twice"),
    ],
)
def test_what_is_no_plain_document_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
