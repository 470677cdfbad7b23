"""What a feedback step keeps, counted tensor by tensor: less than a LoRA step on the same model keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_coupling import large_model
from test_transfer import SETTINGS
from torch import Tensor

from conftest import make_model, make_tokenizer
from plugbridge.evaluate import mean_loss
from plugbridge.memory.alive import Alive
from plugbridge.memory.case import Case
from plugbridge.memory.rows import coupled
from plugbridge.memory.steps import STEPS, MakeStep
from plugbridge.models import layout_for
from plugbridge.shrink.bridge import prune_model
from plugbridge.shrink.importance import magnitude
from plugbridge.shrink.prune import plan_bridge
from plugbridge.shrink.sizes import reduced_sizes
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, require_gradients
from plugbridge.tuners.module import attach, state_of, unpack
from plugbridge.tuners.table import METHODS as TABLE

ROWS = [Encoded(tuple(range(5, 29)), ((3, 1), (4, 1)), i % 2) for i in range(6)]


class Kept:
    """Bytes of tensors that autograd holds for a backward pass: now, and at most so far."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.counts: dict[int, int] = {}
        self.peak = 0

    def take(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)

    def change(self, tensor: Tensor, by: int) -> None:
        key = tensor.untyped_storage().data_ptr()
        self.counts[key] = self.counts.get(key, 0) + by
        self.alive[key] = tensor.untyped_storage().nbytes() if self.counts[key] > 0 else 0
        self.peak = max(self.peak, sum(self.alive.values()))


class Held:
    """One saved tensor; gone when autograd lets it go."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.change(tensor, 1)

    def __del__(self) -> None:
        self.kept.change(self.tensor, -1)


@contextmanager
def saved() -> Iterator[Kept]:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.take, lambda held: held.tensor):
        yield kept


def lora_step(family: str) -> Kept:
    model = large_model(family)
    layout = layout_for(model)
    wrapped, _ = attach(model, TABLE["lora"], layout, SETTINGS)
    with saved() as kept:
        mean_loss(
            wrapped, gold(Encoder(make_tokenizer(), layout.family.kind, None), ROWS), layout.family.kind
        ).backward()
    return kept


def feedback_step(family: str, **changes: Any) -> Kept:
    large = large_model(family)
    layout = layout_for(large)
    plan = plan_bridge(layout, magnitude(large, layout), reduced_sizes(layout, 2))
    wrapped, _ = attach(large_model(family), TABLE["lora"], layout, SETTINGS)
    coupling = Coupling(
        method=TABLE["lora"], settings=SETTINGS, small=layout, large=layout, plan=plan,
        bridge=prune_model(large, layout, plan, {}), encoder=Encoder(make_tokenizer(), layout.family.kind, None),
        module=unpack(TABLE["lora"], layout, state_of(wrapped)), plug={}, down={}, train_bridge=False,
        large_model=large, **changes,
    )  # fmt: skip
    require_gradients(coupling)
    loss = MODES["feedback"].start(coupling)
    with saved() as kept:
        loss(ROWS).backward()
    return kept


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_autograd_never_holds_more_than_a_part_of_what_lora_holds(family: str) -> None:
    exact, through = lora_step(family).peak, feedback_step(family).peak
    assert 0 < through < 0.5 * exact


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_the_graph_of_a_sublayer_is_gone_before_the_next(family: str) -> None:
    """More layers, no more at once: two layers with modules hold what one does, but for a scalar a module."""
    one = feedback_step(family, first=dict.fromkeys(layout_for(large_model(family)).layers, 1)).peak
    assert feedback_step(family).peak == pytest.approx(one, rel=1e-3)


def peak_of(case: Case, make: MakeStep) -> int:
    """Bytes of all tensors that a step has at most, the models, gradients and optimizer included."""
    with Alive() as alive:
        step = make(case)
        step.begin()
        alive.peaks.clear()
        step.work()
    return alive.peak


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_a_feedback_step_takes_less_than_a_lora_step_on_the_same_model(family: str) -> None:
    """Everything counts: weights, the Bridge, what visits keep, optimizer. Real tensors, in one run."""
    shape = make_model(family, hidden=64, layers=6, heads=4).config
    lora = Case(shape, 8, 24, trained={})
    through = coupled(lora, shape, "feedback").case
    exact, ours = peak_of(lora, STEPS["tuned"]), peak_of(through, STEPS["couple, feedback"])
    weights = sum(parameter.nbytes for parameter in make_model(family, hidden=64, layers=6, heads=4).parameters())
    assert weights < ours < 0.75 * exact
    everywhere = replace(through, trained={})
    assert ours < peak_of(everywhere, STEPS["couple, feedback"]) < exact
