"""Predictions are made once each, by a second process and by this one while it waits."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

import pytest

from plugbridge.config import parse_config
from plugbridge.memory.predict import Trace, predict
from plugbridge.memory.rows import Row
from plugbridge.plan import beside
from plugbridge.plan.beside import second_process
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import subjects_of, works_of

Raw = dict[str, Any]


class Slow(Executor):
    """Takes one task and is done with it when it is told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks.append((future, fn, args))
        return future

    def finish(self) -> None:
        future, fn, args = self.tasks[-1]
        future.set_result(fn(*args))


def rows_of(names: str) -> list[Row]:
    """Rows that nothing is traced for: see `traced`."""
    return [Row(name, "", name, print) for name in names]  # pyright: ignore[reportArgumentType]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were predicted, in order."""
    asked: list[str] = []

    def predicted(case: str, _make: object) -> Trace:
        asked.append(case)
        return Trace({"": ord(case)}, 0, 0, 0, 0)

    monkeypatch.setattr("plugbridge.plan.predictions.predict", predicted)
    return asked


def test_equal_cases_are_predicted_once(traced: list[str]) -> None:
    predictions = Predictions()
    assert [trace.peak for trace in predictions.all(rows_of("aba"))] == [ord("a"), ord("b"), ord("a")]
    assert traced == ["a", "b"]


def test_what_the_other_has_not_begun_is_made_here_while_it_is_waited_for(traced: list[str]) -> None:
    slow = Slow()
    predictions = Predictions(slow)
    predictions.expect(rows_of("abc"))
    assert len(slow.tasks) == 1  # the others stay for whoever is free first
    assert predictions.of(rows_of("c")[0]).peak == ord("c")
    threading.Timer(0.2, slow.finish).start()
    assert predictions.of(rows_of("a")[0]).peak == ord("a")
    assert traced == ["c", "b", "a"]
    assert len(slow.tasks) == 1  # nothing was left


def test_the_other_goes_on_with_the_next(traced: list[str]) -> None:
    slow = Slow()
    predictions = Predictions(slow)
    predictions.expect(rows_of("abc"))
    slow.finish()
    slow.finish()
    slow.finish()
    assert [trace.peak for trace in predictions.all(rows_of("abc"))] == [ord(name) for name in "abc"]
    assert traced == ["a", "b", "c"]


def test_what_a_killed_process_owes_is_made_here(traced: list[str]) -> None:
    slow = Slow()
    predictions = Predictions(slow)
    predictions.expect(rows_of("ab"))
    slow.tasks[0][0].set_exception(BrokenExecutor())
    assert [trace.peak for trace in predictions.all(rows_of("a"))] == [ord("a")]
    assert traced == ["a"]


def test_a_second_process_predicts_the_same(run_config: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [work.row for work in works_of(subjects_of(parse_config(run_config(), "x"), 8, None))]
    monkeypatch.setattr(beside, "_cores", lambda: 2)
    with second_process() as pool:
        assert pool is not None
        there = [pool.submit(predict, row.case, row.make).result() for row in rows]
        assert not pool.submit(_has_imported, "bitsandbytes").result()
        assert pool.submit(_has_imported, "peft").result()
    assert there == [predict(row.case, row.make) for row in rows]
    monkeypatch.setattr(beside, "_cores", lambda: 1)
    with second_process() as pool:
        assert pool is None


def _has_imported(name: str) -> bool:
    return sys.modules.get(name) is not None
