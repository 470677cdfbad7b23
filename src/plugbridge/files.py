"""Writing so that a reader never sees half a file: a temporary name beside it, fsync, rename."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plugbridge.errors import PlugbridgeError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM)
_UNUSABLE = (
    errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ESTALE,
)  # fmt: skip
"""What is wrong with a path or its disk, and not with the program."""
_TAKEN = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
"""What is wrong with a path is what stands there, or above it."""


@contextmanager
def disk_errors(path: Path, strict: bool = False) -> Generator[None]:
    """Turn a full disk, and what else keeps a path from being written, into one clear error.

    What was written before stays as it was. `strict` is for blocks that only write: every error of the system is one.
    """
    path = _as_known(path)
    try:
        yield
    except PlugbridgeError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number in _FULL:
            raise RunError(f"no space left to write {path}; free some disk and run again to resume") from error
        if number == errno.EFBIG:
            raise RunError(f"the limit on file sizes (ulimit -f) is too low to write {path}; raise it") from error
        if number in _REFUSED:
            raise RunError(f"not allowed to write {path}: {os.strerror(number)}") from error
        if number in _UNUSABLE or (strict and number is not None) or (strict and isinstance(error, ValueError)):
            why = os.strerror(number) if number is not None else str(error)  # a path that cannot be
            taken = number in _TAKEN or (number == errno.ENOENT and path.is_symlink())
            remedy = "move away what is in its place, or choose another" if taken else "choose another place"
            raise RunError(f"cannot write {path}: {why}; {remedy}") from error
        raise


def _as_known(path: Path) -> Path:
    """A path as users know it: what is written to a temporary name beside its own is told by its own."""
    return Path(*(part[1:-5] if re.fullmatch(r"\..+\.part", part) else part for part in path.parts))


def _system_error(error: BaseException) -> int | None:
    """The operating system's error number behind an exception.

    torch.save raises another error while it handles the system's; safetensors and tokenizers only
    name the number ("No space left on device (os error 28)").
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found.errno
        named = re.search(r"\(os error (\d+)\)", str(found))
        if named:
            return int(named[1])
        found = found.__cause__ or found.__context__
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomically(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.unlink(missing_ok=True)  # a link there would be followed, at a pipe it would be waited
    with disk_errors(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Generator[Path]:
    """Like `write_atomically` for a whole folder; an old folder is replaced only at the end."""
    temporary, before = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not path.exists():  # killed between the two renames below: the only copy there is
            before.replace(path)
        shutil.rmtree(before, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():  # away as a whole: half of it, without its marker, would be nobody's
                path.replace(before)
            temporary.replace(path)
            _sync(path.parent)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path, what: str = "choose another place") -> None:
    """Refuse a folder that cannot be, or in which nothing can be written; leaves nothing there. Raises RunError."""
    with disk_errors(path, strict=True):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # a name that can be none
        above = next((place for place in (path, *path.parents) if place.exists() or place.is_symlink()), path)
        if not above.is_dir():
            found = "a file" if above.exists() else "a link to nowhere"
            raise RunError(f"{above} is {found}; {what}")
        Path(tempfile.mkdtemp(prefix=".plugbridge-", dir=above)).rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
