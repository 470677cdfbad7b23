"""YAML documents read strictly: YAML 1.2's scalars, no key twice, no tags, bounded in size, depth and expansion.

PyYAML's own loader follows YAML 1.1: `1e-3` is a text there, `017` is 15, `1:30` is 90 and `no` is false; of a key
that stands twice it takes the last. Only its parser is used. A scalar without quotes stays what was written (`Plain`)
until it is known what its key holds: a text key takes it letter by letter.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)

from plugbridge.errors import ConfigError
from plugbridge.parsing import one_line, require_characters, shown

LONGEST = 256 * 1024
"""Characters of a document."""
DEEPEST = 32
"""Levels of lists and tables."""
MOST = 50_000
"""Scalars, lists and tables of a document, those that an alias stands for counted wherever it does."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DIGITS = 400  # of a number: the largest float has 309
_NULLS = ("", "~", "null", "Null", "NULL")


class Plain(str):
    """A scalar written without quotes: as a string its letters, and the `value` that YAML 1.2's core schema gives it.

    A number with leading zeros is a text, as YAML 1.1 would take it for another number; so is what is no finite number.
    """

    @property
    def is_null(self) -> bool:
        return self in _NULLS

    @property
    def value(self) -> bool | int | float | str | None:
        text = str(self)
        if self.is_null:
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text[0] in "tT"
        if len(text) > _DIGITS:
            return text
        if _INTEGER.fullmatch(text):
            return int(text)
        if _BASED.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            number = float(text)
            return number if math.isfinite(number) else text
        return text


def parse_yaml(text: str, source: str) -> Any:
    """A document's content: tables with texts as keys, lists, texts, and `Plain` for every scalar without quotes.

    An empty document is None. Raises ConfigError with one line that begins with `source`.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{source}: {len(text):,} characters; {LONGEST:,} are read at most")
    try:
        return _Document(source, yaml.parse(text, Loader=yaml.SafeLoader)).content()
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        said = error.problem or error.context or "not readable"
        raise ConfigError(f"{source} is not YAML: {one_line(said)}{place}") from error
    except Exception as error:  # of PyYAML: its reader's errors, and those of chr() for an escape beyond Unicode
        raise ConfigError(f"{source} is not YAML: {one_line(error)}") from error


def plain_value(text: str) -> Any:
    """What a single scalar without quotes stands for, such as the value in ``tune.steps=5``."""
    return Plain(text).value


class _Document:
    """One document's events, taken one after another. A node is read as (content, nodes in it)."""

    def __init__(self, source: str, events: Iterator[Event]) -> None:
        self._source = source
        self._events = events
        self._anchors: dict[str, tuple[Any, int] | None] = {}

    def content(self) -> Any:
        event = self._next(skip=1)  # the stream's start
        if isinstance(event, StreamEndEvent):
            return None
        self._refuse_directives(event)
        found, _ = self._node(self._next(), 0)
        event = self._next()
        assert isinstance(event, DocumentEndEvent)
        event = self._next()
        if not isinstance(event, StreamEndEvent):
            raise self._fault(event, "a second document begins; expected one")
        return found

    def _next(self, skip: int = 0) -> Event:
        for _ in range(skip):
            next(self._events)
        return next(self._events)

    def _fault(self, event: Event, said: str) -> ConfigError:
        return ConfigError(f"{self._source}: line {event.start_mark.line + 1}: {said}")

    def _refuse_directives(self, event: Event) -> None:
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise self._fault(event, "a % directive; remove it")

    def _node(self, event: Event, depth: int) -> tuple[Any, int]:
        if isinstance(event, AliasEvent):
            return self._alias(event)
        assert isinstance(event, NodeEvent)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self._fault(event, f"tag {shown(tag)}; expected plain keys and values, remove it")
        if depth > DEEPEST:
            raise self._fault(event, f"more than {DEEPEST} levels of lists and tables")
        if event.anchor is not None:
            if event.anchor in self._anchors:
                raise self._fault(event, f"anchor {shown(event.anchor)} stands twice")
            self._anchors[event.anchor] = None  # until its node ends
        if isinstance(event, ScalarEvent):
            found: tuple[Any, int] = (self._scalar(event), 1)
        elif isinstance(event, MappingStartEvent):
            found = self._table(event, depth)
        else:
            found = self._list(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = found
        return found

    def _alias(self, event: AliasEvent) -> tuple[Any, int]:
        if event.anchor not in self._anchors:
            raise self._fault(event, f"alias {shown(event.anchor)} of no anchor before it")
        found = self._anchors[event.anchor]
        if found is None:
            raise self._fault(event, f"alias {shown(event.anchor)} stands inside of what it names")
        return found

    def _scalar(self, event: ScalarEvent) -> str:
        text: str = event.value
        if not text.isascii():  # two escapes of UTF-16, as JSON writes a character beyond U+FFFF
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        require_characters(text, f"{self._source}: line {event.start_mark.line + 1}", ConfigError)
        return Plain(text) if event.style is None else text

    def _table(self, start: CollectionStartEvent, depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        size = 1
        while not isinstance(event := self._next(), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise self._fault(event, "a list, table or alias as a key; expected a text")
            key = str(self._node(event, depth)[0])
            if key == "<<" and event.style is None:
                raise self._fault(event, "<< is not read; write out the keys that it would merge")
            if key in found:
                raise self._fault(event, f"key {shown(key)} stands twice, first in line {lines[key]}; keep one")
            lines[key] = event.start_mark.line + 1
            found[key], inner = self._node(self._next(), depth + 1)
            size = self._grown(start, size + inner + 1)
        return found, size

    def _list(self, start: Event, depth: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        size = 1
        while not isinstance(event := self._next(), SequenceEndEvent):
            item, inner = self._node(event, depth + 1)
            found.append(item)
            size = self._grown(start, size + inner)
        return found, size

    def _grown(self, start: Event, size: int) -> int:
        if size > MOST:
            raise self._fault(start, f"more than {MOST:,} values, those that aliases stand for counted")
        return size
