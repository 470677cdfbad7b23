"""What users hand over, read in one place per kind: files and JSON, with every foreign exception made one line.

YAML is read in `config/document.py`, safetensors in `tensors/headers.py`; both stand on this.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, cast

from plugbridge.errors import PlugbridgeError

DEEPEST = 64
"""Levels of lists and objects in JSON; what tasks and models need is a handful."""
DIGITS = 4300
"""Of a whole number in JSON: Python reads no more, and refuses in its own terms."""
LINE = 300
"""Characters that a foreign message may take in ours."""

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def one_line(said: object, most: int = LINE, word: int = LINE) -> str:
    """What something says in one line, cut in the middle where it is too long: the cause often stands at the end.

    So is every `word` in it, as a name may be that somebody gave; what would steer a terminal is written out.
    """
    text = " ".join(_cut(part, word, "…") for part in str(said).split())
    return _cut(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text), most, " … ")


def _cut(text: str, most: int, mark: str) -> str:
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]}{mark}{text[len(text) - (most - head) :]}"


def shown(value: object, most: int = 80) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value if not isinstance(value, str) else str(value[: most + 1]))
    return text if len(text) <= most else f"{text[:most]}…"


def path_of(text: str, what: str, kind: type[PlugbridgeError]) -> Path:
    """A path that a user wrote, `~` expanded, whether there is something or not. Raises `kind` if it can be none."""
    try:
        if "\0" in text:  # of which `exists` only says that there is no such file
            raise ValueError("it has a NUL character")
        path = Path(text).expanduser()
        os.fsencode(path)
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no characters, links in a circle, `~` of no user
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise kind(f"{what}: {shown(text)} can be no path: {one_line(why)}") from error
    return path


def resolved(path: Path) -> Path:
    """An absolute path without links. Of links in a circle, for which `Path.resolve` raises, what is left of them."""
    return Path(os.path.realpath(path))


def read_bytes(path: Path, kind: type[PlugbridgeError], what: str = "", most: int | None = None) -> bytes:
    """A whole file, `what` it is to the reader. Raises `kind` where it is no file, too large or not readable."""
    name = f"{what} {path}".strip()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe may wait for ever, and can be done once only
            raise kind(f"cannot read {name}: it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'special')}, not a file")
        with path.open("rb") as file:
            raw = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise kind(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise kind(f"cannot read {one_line(repr(str(path)))}: no file has such a name") from error
    if most is not None and len(raw) > most:
        raise kind(f"{name} has more than {most:,} bytes, which is all that is read; is it the right file?")
    return raw


def read_text(path: Path, kind: type[PlugbridgeError], what: str = "", most: int | None = None) -> str:
    """A UTF-8 file without its byte order mark. Raises `kind`."""
    raw = read_bytes(path, kind, what, most)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text (byte {error.start} of the file)") from error


def parse_json(text: str | bytes, where: str, kind: type[PlugbridgeError]) -> Any:
    """JSON as the standard has it: no NaN or infinity, no key twice in an object, no half of a surrogate pair.

    Raises `kind` with one line that begins with `where`.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = _STRICT.decode(decoded)
    except RecursionError as error:
        raise kind(f"{where}: not usable JSON: more than {DEEPEST} levels of brackets") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise kind(f"{where}: not JSON ({error.msg.removesuffix(' at')}, {place})") from error
    except UnicodeDecodeError as error:
        raise kind(f"{where}: not JSON (not UTF-8 text at byte {error.start})") from error
    except ValueError as error:
        raise kind(f"{where}: not JSON ({one_line(error)})") from error
    if decoded.count("[") + decoded.count("{") > DEEPEST and _deeper(value, DEEPEST):
        raise kind(f"{where}: not usable JSON: more than {DEEPEST} levels of brackets")
    if (_ESCAPED_SURROGATE.search(decoded) or _SURROGATE.search(decoded)) and not _is_text(value):
        raise kind(f"{where}: not JSON (a text holds half of a surrogate pair, which is no character)")
    return value


def read_json(path: Path, kind: type[PlugbridgeError], what: str = "", most: int | None = None) -> Any:
    """A JSON file's value, by `read_text` and `parse_json`. Raises `kind`."""
    return parse_json(read_text(path, kind, what, most), str(path), kind)


def require_characters(text: str, where: str, kind: type[PlugbridgeError]) -> None:
    """Raises `kind` for a text with NUL, or with what is no character at all: paths and tokenizers fail on them."""
    if "\0" in text:
        raise kind(f"{where}: {shown(text)} has a NUL character, which no name or prompt may have")
    if _SURROGATE.search(text):
        raise kind(f"{where}: {shown(text)} has half of a surrogate pair, which is no character")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{one_line(text, 40)} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"{one_line(text, 40)} is a whole number of {len(text):,} digits, more than are read")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(twice)} stands twice in an object")
    return found


_STRICT = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_object
)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(cast(dict[str, Any], value).values())
    return cast(list[Any], value) if isinstance(value, list) else []


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are in each other more than so many times."""
    level = [value]
    for _ in range(most + 1):
        level = [part for whole in level if isinstance(whole, dict | list) for part in [*_parts(whole), None]]
        if not level:
            return False
    return True


def _is_text(value: Any) -> bool:
    """Whether all texts of a JSON value are made of whole characters."""
    left = [value]
    while left:
        now = left.pop()
        keys = list(cast(dict[str, Any], now)) if isinstance(now, dict) else []
        if any(_SURROGATE.search(text) for text in (*keys, now) if isinstance(text, str)):
            return False
        left.extend(_parts(now))
    return True
