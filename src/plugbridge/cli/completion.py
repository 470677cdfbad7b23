"""What a shell offers behind options: keys of the file and their values, names of models, tasks and tables."""

import os
from collections.abc import Callable, Iterable

_COMPLETE = "_PLUGBRIDGE_COMPLETE"
_KEY = "_PLUGBRIDGE_COMPLETE_KEY"
"""The key of the setting whose value is typed, where the shell takes the value alone for a word."""


def whole_settings() -> None:
    """Make ``couple.mode = fe`` one word again, which bash parts at the equals sign (COMP_WORDBREAKS).

    Of the word that is typed the value is left, which is what bash replaces, and its key is kept for `settings`.
    """
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    if os.environ.get(_COMPLETE) != "complete_bash" or not at.isdecimal():
        return
    place, joined = int(at), list[str]()
    for word in words[: place + 1]:
        if joined and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    if "=" in words[place - 1 : place + 1]:
        os.environ[_KEY], _, joined[-1] = joined[-1].partition("=")
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)


def settings(given: str) -> list[str]:
    """Keys of a run's file that begin as what was typed, or what a key may be set to, as far as there is a list."""
    if key := os.environ.get(_KEY):
        return [value for value in _values_of(key) if value.startswith(given)]
    key, equals, begun = given.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values_of(key) if value.startswith(begun)]
    from plugbridge.config import fields_help

    return [f"{name}=" for name, _, _ in fields_help() if name.startswith(given)]


def _values_of(key: str) -> Iterable[str]:
    if key == "method.name":
        from plugbridge.tuners.table import METHODS

        return METHODS
    if key == "couple.mode":
        return _modes()
    if key == "task":
        return _tasks()
    from plugbridge.config import field_values

    return field_values(key)


def _tasks() -> Iterable[str]:
    from plugbridge.tasks.spec import task_names

    return task_names()


def _models() -> Iterable[str]:
    from plugbridge.report import TITLES

    return TITLES


def _modes() -> Iterable[str]:
    from plugbridge.transfer.couple import MODES

    return MODES


def _shapes() -> Iterable[str]:
    return ("small", "paper", "gpt2-xl", "t5-3b", "t5-11b")


def one_of(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Offers those of some names that begin as what was typed."""

    def offer(given: str) -> list[str]:
        return [name for name in names() if name.startswith(given)]

    return offer


tasks, models, modes, shapes = map(one_of, (_tasks, _models, _modes, _shapes))
