"""The one exception tree: everything a user can mend by changing input is a `PlugbridgeError`.

The command line prints such an error as one line (fact, expectation, remedy) and exits with
code 2; anything else is a bug and keeps its traceback.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PlugbridgeError(Exception):
    """Base of all errors that name a user's mistake or an outside limit."""


class ConfigError(PlugbridgeError):
    """The run's configuration is not usable."""


class ModelError(PlugbridgeError):
    """A model directory is missing, unreadable, or not of a known family."""


class NotFinite(ModelError):
    """A model's answers are NaN or infinite."""


class DataError(PlugbridgeError):
    """A task's rows are missing or malformed; the message names file and line."""


class RunError(PlugbridgeError):
    """The run directory cannot be used: locked, out of order, or out of disk."""


class TrainingDiverged(PlugbridgeError):
    """A loss was not finite; `learned` is whether anything had been learned before."""

    def __init__(self, message: str, learned: bool = True) -> None:
        super().__init__(message)
        self.learned = learned


class ShapeError(PlugbridgeError):
    """A tensor does not have the shape its named axes promise."""


def first_problem(error: "ValidationError", source: str) -> str:
    """The first thing that is wrong with checked data, in one line: source, key, message."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return ": ".join(part for part in (source, where, complaint(first["type"], first["msg"])) if part)


def complaint(kind: str, message: str) -> str:
    """What pydantic says, less the names of our own classes."""
    if kind in ("model_type", "dict_type"):
        return "expected keys and values"
    return message.removeprefix("Value error, ")
