"""Standard output and error as they may be: closed, a full device, a pipe whose reader has gone, without Unicode."""

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from plugbridge.errors import PlugbridgeError

GONE = 141
"""The exit status of a program whose reader has gone: that of the signal SIGPIPE in a shell."""


class OutputError(PlugbridgeError):
    """What a command prints cannot be written; `gone` is whether its reader has gone, who needs no message."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


@contextmanager
def standard_streams() -> Generator[None]:
    """Have what cannot be printed end a command with OutputError; what cannot be said on standard error is dropped.

    A run is worth more than its messages: whoever reads its standard error may leave.
    """
    _occupy()
    before = sys.stdout, sys.stderr
    closed = sys.stdout is None  # pyright: ignore[reportUnnecessaryComparison]
    sys.stdout = cast(TextIO, _Stream(sys.stdout, strict=True))
    sys.stderr = cast(TextIO, _Stream(sys.stderr, strict=False))
    try:
        if closed:
            raise OutputError("standard output is closed; send it to a file, or to /dev/null")
        try:
            yield
        except SystemExit:  # which is how commands end, well or not
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def drop_output() -> None:
    """Send what is still to be printed nowhere, or Python says at its end that it could not."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Stream:
    """A text stream whose writing never raises an error of the system: OutputError where it is `strict`, else none."""

    def __init__(self, stream: Any, strict: bool) -> None:
        self._stream = stream
        self._strict = strict
        if hasattr(stream, "reconfigure"):  # a terminal that knows no Unicode, or a file name that is none
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, name: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, name)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            if self._strict:
                why = error.strerror if isinstance(error, OSError) else str(error)
                gone = isinstance(error, BrokenPipeError)
                raise OutputError(f"cannot write standard output: {why}; send it elsewhere", gone) from error


def _occupy() -> None:
    """Open what is closed of the first three files: or the next file that is opened gets what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
