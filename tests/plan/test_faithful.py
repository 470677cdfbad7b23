"""A plan names the most faithful way that fits: exact gradients in memory, streamed, or through 4 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from plugbridge.config import parse_config
from plugbridge.memory.predict import Trace
from plugbridge.memory.rates import Rates
from plugbridge.plan.faithful import EXACT, QLORA, most_faithful
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import subjects_of, works_of

RATES = {torch.float32: Rates(1e9, 1e9), torch.bfloat16: Rates(1e9, 1e9)}


class Told(Predictions):
    """Predictions that are told: peaks by residence, bits and rows at a time."""

    def of(self, row: Any) -> Trace:
        case = row.case
        peak = 30 if case.bits else 40 if case.streamed else 100
        peak += case.micro_batch or case.batch
        read = 1000.0 if case.streamed else 0.0
        return Trace({"": peak}, {torch.float32: 2e9}, {}, case.batch, 1, read)


@pytest.mark.parametrize(
    ("memory", "way", "settings"),
    [
        (200, f"{EXACT}, in memory", ("resident=all",)),
        (103, f"{EXACT}, in memory", ("resident=all", "couple.micro_batch=1")),
        (60, f"{EXACT}, streamed", ("resident=none",)),
        (41, f"{EXACT}, streamed", ("resident=none", "couple.micro_batch=1")),
        (35, QLORA, ("large.load_in=4bit", "couple.micro_batch=1")),
        (30, None, ()),
    ],
)
def test_the_first_that_fits_is_named(
    run_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    memory: int, way: str | None, settings: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "plugbridge.plan.faithful.check_blocks", lambda *_: None
    )  # these models' are no multiples of 64
    monkeypatch.setattr("plugbridge.plan.faithful.installed", lambda _package: True)
    s = subjects_of(parse_config(run_config(), "test"), 8, None)
    mine = Trace({"": 20}, {torch.float32: 1e9}, {}, 4, 1, 250.0)
    works = [(work, mine) for work in works_of(s)]
    found = most_faithful(s, works, memory, RATES, Told())
    if way is None:
        assert found is None
        return
    assert found is not None
    assert (found.way, found.settings) == (way, ("couple.mode=backprop", *settings))
    assert "feedback takes 0.50 of its time and" in found.said
    assert ("reads 0.25 of its bytes" in found.said) == ("streamed" in way)


def test_what_gains_nothing_is_said_and_a_run_that_is_exact_is_told_so(run_config: Callable[..., Any]) -> None:
    s = subjects_of(parse_config(run_config(), "test"), 8, None)
    dear = Trace({"": 900}, {torch.float32: 9e9}, {}, 4, 1)
    found = most_faithful(s, [(work, dear) for work in works_of(s)], 200, RATES, Told())
    assert found is not None
    assert "it gains nothing here" in found.said
    exact = subjects_of(parse_config(run_config(couple={"steps": 2, "mode": "backprop"}), "test"), 8, None)
    found = most_faithful(exact, [(work, dear) for work in works_of(exact)], 200, RATES, Told())
    assert found is not None
    assert "which is what this run does" in found.said
    assert most_faithful(exact, [], 200, RATES, Told()) is None
