"""Digests of files: of all that is in them, read once.

What was read of a large file is remembered for the user, in the cache folder, for as long as the file's size, times and
place stay as they were: a change of a single bit is seen, and nothing is read again for a file that was only touched.
"""

import hashlib
import json
import logging
import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from plugbridge.errors import PlugbridgeError
from plugbridge.files import write_json
from plugbridge.parsing import read_json, resolved

log = logging.getLogger(__name__)

LARGE = 256 * 2**20
"""Bytes of a file from which its digest is remembered: it takes 0.2 s, and 12 s for 16 GB where disks are fast."""
BLOCK = 4 * 2**20
PATIENCE = 5.0
"""Seconds after which it is said what is being read."""
SETTLED = 2 * 10**9
"""Nanoseconds since a file's last change from which another change shows in its times, on any file system."""
MOST = 1000
"""Files that are remembered."""

Stamp = tuple[int, int, int, int]
"""Size, time of the last write and of the last change of any kind in ns, inode: whoever writes changes one of them."""


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file; one that has not changed since it was last read is not read again.

    Raises PlugbridgeError where it cannot be read.
    """
    try:
        place = resolved(path)
        return _digest_at(place, stamp_of(place))
    except OSError as error:
        raise PlugbridgeError(f"cannot read {path}: {error.strerror}") from error


def stamp_of(path: Path) -> Stamp:
    """What changes when a file does."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=4096)
def _digest_at(path: Path, stamp: Stamp) -> str:
    if stamp[0] < LARGE:
        return _read(path, stamp[0])
    known = _remembered().get(str(path))
    if known is not None and known[0] == stamp:
        return known[1]
    begun = time.time_ns()
    digest = _read(path, stamp[0])
    if stamp_of(path) == stamp and begun - max(stamp[1:3]) > SETTLED:
        _remember(path, stamp, digest)
    return digest


def _read(path: Path, size: int) -> str:
    digest, begun, done, said = hashlib.sha256(), time.monotonic(), 0, False
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            taken = time.monotonic() - begun
            if taken > PATIENCE and not said:
                said = True
                log.info("reading all of %s, %.1f GB, to know it again: some %.0f s more, this once", path, size / 1e9,
                         taken * max(0, size - done) / done)  # fmt: skip
    return digest.hexdigest()


def cache_file() -> Path:
    """Where digests are remembered. Raises RuntimeError where the user has no home."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if folder.startswith("/") else Path.home() / ".cache") / "plugbridge" / "digests.json"


def _remembered() -> dict[str, tuple[Stamp, str]]:
    """Stamp and digest by path; nothing where nothing can be read, or what is there is not ours."""
    try:
        found: Any = read_json(cache_file(), PlugbridgeError)
        return {path: (cast(Stamp, tuple(stamp)), _checked(digest)) for path, stamp, digest in found}
    except (PlugbridgeError, OSError, RuntimeError, ValueError, TypeError):
        return {}


def _checked(digest: Any) -> str:
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"no digest: {json.dumps(digest)}")
    return digest


def _remember(path: Path, stamp: Stamp, digest: str) -> None:
    """Where it cannot be written, the file is read again next time."""
    known = {name: found for name, found in _remembered().items() if name != str(path)}
    newest = [*list(known.items())[-MOST + 1 :], (str(path), (stamp, digest))]
    try:
        # a list: what is sorted by name would not be by age
        write_json(cache_file(), [[name, *found] for name, found in newest])
    except (PlugbridgeError, OSError, RuntimeError) as error:
        log.debug("digests are not remembered: %s", error)
