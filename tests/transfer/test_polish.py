"""Polish: factors scale what a module does, and the search never makes its own loss worse."""

import math

import pytest
import torch
from test_coupling import large_model
from test_transfer import SETTINGS

from conftest import METHODS, logits_of, randomise
from plugbridge.errors import TrainingDiverged
from plugbridge.models import layout_for
from plugbridge.transfer.polish import places_of, scaled, search
from plugbridge.tuners.module import Module, attach, load_state, pack, state_of, unpack
from plugbridge.tuners.table import METHODS as TABLE


def module_of(family: str, method: str) -> Module:
    model = large_model(family)
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE[method], layout, SETTINGS)
    randomise(wrapped)
    return unpack(TABLE[method], layout, state_of(wrapped))


def logits_with(family: str, method: str, module: Module) -> torch.Tensor:
    model = large_model(family)
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE[method], layout, SETTINGS)
    load_state(wrapped, pack(TABLE[method], layout, module))
    return logits_of(wrapped.eval())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_factors_of_one_change_nothing_and_others_do(family: str, method: str) -> None:
    module = module_of(family, method)
    places = places_of(module)
    assert len(places) == len({(s.stack, s.layer, s.site) for s in module})
    same = scaled(TABLE[method], module, dict.fromkeys(places, 1.0))
    assert all(torch.equal(same[slot], module[slot]) for slot in module)
    plain = logits_with(family, method, module)
    for place in places:
        assert not torch.allclose(logits_with(family, method, scaled(TABLE[method], module, {place: 2.0})), plain)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_factor_of_zero_takes_the_module_away(method: str) -> None:
    module = module_of("gpt2", method)
    without = scaled(TABLE[method], module, dict.fromkeys(places_of(module), 0.0))
    assert torch.equal(logits_with("gpt2", method, without), logits_of(large_model("gpt2")))


def test_silent_places_have_no_factor() -> None:
    module = module_of("gpt2", "lora")
    upper = {slot: tensor if slot.layer == 1 else torch.zeros_like(tensor) for slot, tensor in module.items()}
    assert {place.split(":")[1] for place in places_of(upper)} == {"1"}


def test_the_search_finds_a_minimum_and_keeps_its_budget() -> None:
    calls: list[int] = []

    def loss_of(factors: dict[str, float]) -> float:
        return sum((factors[place] - wanted) ** 2 for place, wanted in (("a", 1.5), ("b", 0.7)))

    factors, losses = search(["a", "b"], loss_of, 120, 0, lambda: calls.append(1))
    assert len(losses) == len(calls) == 120
    assert losses[0] == pytest.approx(0.25 + 0.09)
    assert factors["a"] == pytest.approx(1.5, abs=0.05)
    assert factors["b"] == pytest.approx(0.7, abs=0.05)
    assert loss_of(factors) == min(losses)
    assert search(["a", "b"], loss_of, 120, 0, lambda: None) == (factors, losses)


def test_where_nothing_helps_the_factors_stay_one() -> None:
    def loss_of(factors: dict[str, float]) -> float:
        return sum(abs(factor - 1) for factor in factors.values())

    factors, losses = search(["a", "b", "c"], loss_of, 20, 3, lambda: None)
    assert factors == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert losses[0] == min(losses) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_the_worst(bad: float) -> None:
    def loss_of(factors: dict[str, float]) -> float:
        return bad if factors["a"] > 1.05 else (factors["a"] - 0.7) ** 2 + (factors["b"] - 0.7) ** 2

    factors, losses = search(["a", "b"], loss_of, 120, 0, lambda: None)
    assert math.inf in losses
    assert not any(math.isnan(loss) for loss in losses)
    assert [factors["a"], factors["b"]] == pytest.approx([0.7, 0.7], abs=0.05)


def test_a_search_in_which_every_factor_overflows_stays_at_one() -> None:
    def loss_of(factors: dict[str, float]) -> float:
        return 0.5 if factors == {"a": 1.0, "b": 1.0} else math.nan

    factors, losses = search(["a", "b"], loss_of, 40, 0, lambda: None)
    assert (factors, losses) == ({"a": 1.0, "b": 1.0}, [0.5] + [math.inf] * 39)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_said(bad: float) -> None:
    calls: list[int] = []
    with pytest.raises(TrainingDiverged, match=f"^polish: the loss is {bad} with factors of 1$") as e:
        search(["a"], lambda _: bad, 20, 0, lambda: calls.append(1))
    assert len(calls) == 1
    assert not e.value.learned
