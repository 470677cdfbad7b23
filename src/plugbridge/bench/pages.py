"""Whose pages are: what a command writes, it may write again; what somebody else wrote stays."""

from pathlib import Path
from typing import Any, cast

from plugbridge.errors import ConfigError
from plugbridge.files import check_folder
from plugbridge.parsing import read_json, read_text

BESIDE = (".json", ".tex", ".png", ".svg")
_ROWS = {"command", "sets", "obtained", "cosine"}
"""Keys of which every row of a page's JSON has one."""


def check_page(page: Path) -> None:
    """Refuse a page that cannot be written, or is there or has files beside it and was not made by us.

    Raises ConfigError, and RunError for a folder that cannot be.
    Ours say by which command they were made; while a page is not written yet, its JSON may be there already.
    """
    if page.suffix in BESIDE:
        raise ConfigError(f"{page}: a page is a Markdown file, such as {page.with_suffix('.md')}")
    check_folder(page.parent, "a page needs a folder; choose another place")
    beside = [*(page.with_suffix(ending) for ending in BESIDE), page.with_name(f"{page.stem}_rows.json")]
    taken = [path for path in (page, *beside) if path.exists() or path.is_symlink()]
    if taken and not (_says_how(page) if page in taken else _holds_rows(page.with_suffix(".json"))):
        raise ConfigError(f"{taken[0]} was not made by plugbridge; move it away, or choose another place")


def _says_how(page: Path) -> bool:
    try:
        return "\nMade by\n" in read_text(page, ConfigError)
    except ConfigError:
        return False


def _holds_rows(path: Path) -> bool:
    try:
        rows = read_json(path, ConfigError)
    except ConfigError:
        return False
    return isinstance(rows, list) and all(
        isinstance(row, dict) and _ROWS & cast(dict[str, Any], row).keys() for row in cast(list[Any], rows)
    )
