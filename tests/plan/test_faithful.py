"""A plan names the most faithful way that fits: exact gradients in memory, streamed, or through 4 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plugbridge.config import load_config, parse_config
from plugbridge.memory.predict import Trace
from plugbridge.memory.rates import Rates
from plugbridge.plan.faithful import EXACT, QLORA, most_faithful
from plugbridge.plan.predictions import Predictions
from plugbridge.plan.works import subjects_of, works_of
from plugbridge.preflight import check_config

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
    config = parse_config(run_config(), "test")
    s = subjects_of(config, 8, None)
    mine = Trace({"": 20}, {torch.float32: 1e9}, {}, 4, 1, 250.0)
    works = [(work, mine) for work in works_of(s)]
    found = most_faithful(config, 8, works, memory, RATES, Told())
    if way is None:
        assert found is None
        return
    assert found is not None
    assert (found.way, found.settings) == (way, ("couple.mode=backprop", *settings))
    assert "feedback takes 0.50 of its time and" in found.said
    assert ("reads 0.25 of its bytes" in found.said) == ("streamed" in way)


def test_what_gains_nothing_is_said_and_a_run_that_is_exact_is_told_so(run_config: Callable[..., Any]) -> None:
    config = parse_config(run_config(), "test")
    s = subjects_of(config, 8, None)
    dear = Trace({"": 900}, {torch.float32: 9e9}, {}, 4, 1)
    found = most_faithful(config, 8, [(work, dear) for work in works_of(s)], 200, RATES, Told())
    assert found is not None
    assert "it gains nothing here" in found.said
    config = parse_config(run_config(couple={"steps": 2, "mode": "backprop"}), "test")
    exact = subjects_of(config, 8, None)
    found = most_faithful(config, 8, [(work, dear) for work in works_of(exact)], 200, RATES, Told())
    assert found is not None
    assert "which is what this run does" in found.said
    assert most_faithful(config, 8, [], 200, RATES, Told()) is None


PACKED = {"couple.mode=backprop", "prune.bits=null"}


@pytest.mark.parametrize(
    ("changes", "memory", "settings"),
    [
        ({"prune": {"bits": 3}}, 200, {*PACKED, "resident=all"}),
        ({"prune": {"bits": 3, "rounding": "nearest", "shuffle": True}}, 200,
         {*PACKED, "resident=all", "prune.rounding=calibrated", "prune.shuffle=false"}),
        ({"couple": {"error_bound": 0.1, "kept_bits": 8, "activations": "large", "fidelity_rows": 2,
                     "fidelity_every": 1}}, 200,
         {"couple.mode=backprop", "resident=all", "couple.error_bound=0.0", "couple.kept_bits=null",
          "couple.activations=null",
          "couple.fidelity_rows=8", "couple.fidelity_every=0"}),
        ({"couple": {"recompute": False}, "repair": {"steps": 2}}, 60,
         {"couple.mode=backprop", "resident=none", "couple.recompute=true", "repair=null"}),
        ({"load_in": "4bit"}, 200, {"couple.mode=backprop", "resident=all", "large.load_in=null"}),
        ({"load_in": "8bit"}, 60, {"couple.mode=backprop", "resident=none", "large.load_in=null"}),
        ({"load_in": "4bit"}, 35, {"couple.mode=backprop", "large.load_in=4bit", "couple.micro_batch=1"}),
        ({"resident": "none"}, 35,
         {"couple.mode=backprop", "large.load_in=4bit", "couple.micro_batch=1", "resident=all"}),
        ({"couple": {"mode": "standalone", "layer_map": "cka", "down": "learned", "plug_learning_rate": 0.1},
          "evaluate": {"models": ["bridge_coupled"]}}, 200,
         {"couple.mode=backprop", "resident=all", "couple.layer_map=uniform", "couple.down=select",
          "couple.plug_learning_rate=0.001", "evaluate.models=['large_plugged']"}),
        ({"couple": {"mode": "ladder", "cache": "memory"}}, 200,
         {"couple.mode=backprop", "resident=all", "couple.cache=off"}),
    ],
)  # fmt: skip
def test_a_run_accepts_what_is_named(
    run_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    changes: dict[str, Any], memory: int, settings: set[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("plugbridge.plan.faithful.check_blocks", lambda *_: None)
    monkeypatch.setattr("plugbridge.plan.faithful.installed", lambda _package: True)
    raw = run_config()
    raw["couple"] |= {"batch_size": 2}
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    if "load_in" in raw:
        raw["large"] = {"path": raw["large"], "load_in": raw.pop("load_in")}
    config = parse_config(raw, "test")
    works = [(work, Trace({"": 20}, {torch.float32: 1e9}, {}, 4, 1)) for work in works_of(subjects_of(config, 8, None))]
    found = most_faithful(config, 8, works, memory, RATES, Told())
    assert found is not None
    assert {*found.settings} == settings
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    taken = check_config(load_config(tmp_path / "run.yaml", found.settings))
    assert taken.couple.mode == "backprop"
    assert (taken.load_in is not None) == (found.way == QLORA)
    assert (taken.resident == "none") == ("streamed" in found.way)
