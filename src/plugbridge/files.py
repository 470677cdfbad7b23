"""Writing so that a reader never sees half a file: a temporary name beside it, fsync, rename."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plugbridge.errors import PlugbridgeError, RunError

_WHOLE = 256 * 1024 * 1024
_SAMPLE = 1024 * 1024


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a full disk into one clear error; what was written before stays as it was."""
    try:
        yield
    except PlugbridgeError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"no space left to write {path}; free some disk and run again to resume") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunError(f"not allowed to write {path}: {os.strerror(number)}") from error
        raise


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
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file; beyond 256 MiB of its size, modification time, first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(_SAMPLE):
                digest.update(block)
        else:
            digest.update(f"{size}:{path.stat().st_mtime_ns}".encode())
            digest.update(file.read(_SAMPLE))
            file.seek(-_SAMPLE, os.SEEK_END)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Digest of every file in a folder by relative name; hidden files are skipped."""
    names = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest_of({str(p.relative_to(folder)): file_digest(p) for p in names})
