"""A prediction is what a real step counts, tensor by tensor, for every step, family and method."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model
from plugbridge.cost import measure, return_blocks, settle
from plugbridge.memory.alive import Alive, fake_tensors
from plugbridge.memory.case import Case
from plugbridge.memory.predict import count, predict, trace
from plugbridge.memory.rates import primitive_bytes
from plugbridge.memory.rows import coupled
from plugbridge.memory.shapes import find_shapes
from plugbridge.memory.steps import STEPS, Step
from plugbridge.memory.weights import write_weights
from plugbridge.streaming import window_of
from plugbridge.transfer.coupling import Coupling
from plugbridge.tuners.table import METHODS, MethodSettings

FAMILIES = ("gpt2", "t5", "llama")
TRAINED = {"couple, feedback", "couple, ladder_delta", "couple, backprop"}


def case_of(family: str, layers: int = 6, **changes: Any) -> Case:
    """A tiny model's shape, without dropout, deeper than what is traced."""
    config = make_model(family, hidden=32, layers=layers, heads=4).config
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return Case(config, 4, 16, settings=MethodSettings(2, 4.0), reduction=2, **changes)


def with_top(case: Case, step: str) -> Case:
    if step.startswith("align") or step == "evaluate, proxy":
        return replace(case, small=make_model(case.config.model_type, layers=2).config)
    if step not in TRAINED:
        return case
    return replace(case, trained=dict.fromkeys(case.layers, 4), channels="gradient_pca")


def really_alive(case: Case, make: Any) -> int:
    """The most bytes alive in a real run of the step."""
    with Alive() as alive:
        step = make(case)
        return count(alive, case, step).peak


@pytest.mark.parametrize(
    ("step", "family"),
    [
        *product(("full fine-tuning", "couple, feedback"), FAMILIES),
        ("tuned", "llama"),
        ("couple, backprop", "t5"),
        ("align, ridge, cka", "t5"),
        ("evaluate, bridge", "gpt2"),
        ("evaluate, ladder", "t5"),
        ("evaluate, proxy", "llama"),
        ("couple, mezo", "gpt2"),
    ],
)
def test_a_prediction_is_close_to_what_a_real_step_has_alive(step: str, family: str) -> None:
    case = with_top(case_of(family), step)
    assert predict(case, STEPS[step]).peak == pytest.approx(really_alive(case, STEPS[step]), rel=0.15)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_feedback_through_a_packed_bridge_is_close_to_what_a_real_step_has_alive(family: str) -> None:
    """Positions without an error, which a prediction cannot know, are counted with the others."""
    case = replace(with_top(case_of(family), ""), reduction=1, packed=2, activations="large")
    plain, step = replace(case, packed=16), STEPS["couple, feedback"]
    assert predict(case, step).peak == pytest.approx(really_alive(case, step), rel=0.15)
    assert predict(case, step).peak < predict(plain, step).peak


def test_feedback_through_a_streamed_bridge_has_two_blocks_of_it() -> None:
    case = replace(with_top(case_of("gpt2", layers=8), ""), reduction=1, packed=3, activations="large")
    streamed, step = replace(case, bridge_streamed=True), STEPS["couple, feedback"]
    found, whole = predict(streamed, step), predict(case, step)
    assert found.peak == pytest.approx(really_alive(streamed, step), rel=0.15)
    assert found.peak == pytest.approx(trace(streamed, step).peak, rel=0.02)
    assert found.peak < whole.peak
    assert found.read > whole.read == 0


def test_packing_a_bridge_extends_to_the_true_depth() -> None:
    case = case_of("gpt2", packed=3)
    assert predict(case, STEPS["prune"]).peak == pytest.approx(trace(case, STEPS["prune"]).peak, rel=0.02)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_repair_of_logits_is_close_to_what_a_real_one_has_alive(family: str) -> None:
    case = replace(case_of(family), target="logits")
    assert predict(case, STEPS["repair"]).peak == pytest.approx(really_alive(case, STEPS["repair"]), rel=0.15)


PAIRED = {"align, ridge, uniform", "align, procrustes, cka"}
"""Starts whose plug and layer map are each in another one."""


@pytest.mark.parametrize("step", [step for step in STEPS if step not in PAIRED])
def test_shallow_traces_extend_to_the_true_depth(step: str) -> None:
    case = with_top(case_of("gpt2", layers=8), step)
    short, whole = predict(case, STEPS[step]), trace(case, STEPS[step])
    assert short.peak == pytest.approx(whole.peak, rel=0.02)
    assert short.flops == pytest.approx(whole.flops)
    assert short.trained == whole.trained


@pytest.mark.parametrize("recompute", [True, False])
def test_a_feedback_step_takes_no_more_the_second_time(recompute: bool) -> None:
    case = replace(with_top(case_of("gpt2"), "couple, feedback"), recompute=recompute)

    def peak(done_before: bool) -> float:
        with fake_tensors(), Alive() as alive:
            step = STEPS["couple, feedback"](case)
            if done_before:
                step.work()
            return count(alive, case, step).peak

    assert peak(True) == pytest.approx(peak(False), rel=0.002)


def test_primitives_are_products_in_half_precision_that_differ() -> None:
    case = with_top(case_of("gpt2", layers=6), "couple, feedback")
    assert predict(case, STEPS["couple, feedback"]).primitives == 0
    half = replace(case, dtype=torch.bfloat16)
    found, deeper = (predict(one, STEPS["couple, feedback"]) for one in (half, half.with_layers({"decoder": 8}, {})))
    with Alive() as alive:
        step = STEPS["couple, feedback"](half)
        assert count(alive, half, step).primitives == found.primitives > 4
    assert deeper.primitives == found.primitives  # one serves every layer
    assert found.keeping(1000).peak == found.peak + 1000 * found.primitives
    with Alive() as alive:
        square = torch.ones(4, 4, dtype=torch.bfloat16)
        for other in (square, square, square.mT, square[:2].mT):
            torch.matmul(square, other)
    assert len(alive.primitives) == 3


def test_only_half_precision_on_a_processor_keeps_primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= primitive_bytes("cpu", [torch.float32, torch.bfloat16]) < 4 * 2**20
    resident = iter([1000, 1000 + 24 * 70])
    monkeypatch.setattr("plugbridge.memory.rates.settle", lambda: next(resident))
    assert primitive_bytes("cpu", [torch.float32]) == primitive_bytes("cuda", [torch.bfloat16]) == 0
    assert primitive_bytes("cpu", [torch.float32, torch.bfloat16]) == 70


@pytest.mark.parametrize("step", ["tuned", "couple, feedback", "couple, ladder", "repair"])
def test_a_later_part_of_a_batch_stands_for_all_parts(step: str) -> None:
    case = replace(case_of("gpt2"), batch=6, micro_batch=2)
    whole, counted = trace(case, STEPS[step]), predict(case, STEPS[step])
    assert counted.peak == whole.peak
    assert counted.flops == pytest.approx(whole.flops, rel=0.01)


def test_parts_that_go_together_each_add_their_states() -> None:
    """A streamed model's backpropagation in five parts: no more is read than of one, and no more weights are there."""
    step = STEPS["couple, backprop"]
    case = replace(case_of("gpt2", streamed=True), batch=10, micro_batch=2, together=True)
    counted, whole, one = predict(case, step), trace(case, step), predict(replace(case, batch=2), step)
    assert counted.peak == pytest.approx(whole.peak, rel=0.01)
    assert counted.peak == pytest.approx(really_alive(case, step), rel=0.05)
    assert counted.read == whole.read == one.read
    block, state = one.read / (2 * 6), 2 * 16 * 32 * 4
    assert counted.peak - one.peak < 4 * 10 * state
    resident = predict(replace(case, batch=2, streamed=False), step)
    assert resident.peak - one.peak == pytest.approx((6 - 2) * block, rel=0.1)  # two of six are there


def test_two_stacks_of_different_depth_extend_each_by_its_own_layers() -> None:
    case = case_of("t5")
    case = case.with_layers({"encoder": 4, "decoder": 6}, {})
    assert predict(case, STEPS["tuned"]).peak == pytest.approx(trace(case, STEPS["tuned"]).peak, rel=0.02)


def test_two_streamed_stacks_extend_to_the_true_depth() -> None:
    (shape,) = find_shapes("t5-3b")
    row = coupled(Case(shape.large, 1, 512, streamed=True), shape.small, "feedback")
    case = row.case.with_layers({"encoder": 8, "decoder": 8}, {"encoder": 6, "decoder": 6})
    assert predict(case, row.make).peak == pytest.approx(trace(case, row.make).peak, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_traced(method: str) -> None:
    case = replace(case_of("gpt2"), method=METHODS[method])
    counts = predict(case, STEPS["tuned"])
    assert 0 < counts.trained < 10_000
    assert counts.peak > 0


@pytest.mark.parametrize(("family", "method"), list(zip(FAMILIES, METHODS, strict=True)))
def test_a_start_from_the_small_model_counts_its_plug(family: str, method: str) -> None:
    """What trains is the module at small width, one entry for each large layer, and the plug."""
    case = replace(case_of(family, layers=4, method=METHODS[method]), train_bridge=False)
    small = make_model(family, hidden=16, layers=2, heads=2).config
    step = STEPS["couple, standalone"](replace(case, small=small))
    (coupling,) = step.held
    assert isinstance(coupling, Coupling)
    plug = sum(tensor.numel() for tensor in coupling.plug.values())
    module = sum(tensor.numel() for tensor in coupling.module.values())
    fresh = STEPS["couple, standalone"](case).trained
    assert 0 < module < fresh
    assert step.trained == module + plug
    assert predict(replace(case, small=small), STEPS["couple, standalone"]).trained == step.trained
    step.work()


@pytest.mark.parametrize("step", ["couple, standalone", "couple, ladder_delta"])
def test_a_way_down_that_trains_is_counted(step: str) -> None:
    case = with_top(case_of("gpt2", down="learned"), step)
    (coupling,) = STEPS[step](case).held
    assert isinstance(coupling, Coupling)
    down = sum(tensor.numel() for tensor in coupling.down.values())
    learned, chosen = (predict(one, STEPS[step]) for one in (case, replace(case, down="select")))
    assert learned.trained - chosen.trained == down > 0
    assert learned.peak == pytest.approx(really_alive(case, STEPS[step]), rel=0.15)


def test_packed_weights_take_their_bits() -> None:
    case = case_of("llama", dtype=torch.bfloat16)
    whole, packed = (predict(replace(case, bits=bits), STEPS["evaluate"]).peak for bits in (None, "4bit"))
    assert packed < 0.8 * whole
    assert predict(replace(case, bits="4bit"), STEPS["tuned, checkpointing"]).peak > 0


def test_what_is_freed_is_no_longer_alive_and_what_is_shared_counts_once() -> None:
    with Alive() as alive:
        a = torch.zeros(256)
        b = a.view(16, 16)
        assert alive.now == 1024
        del a, b
        c = torch.zeros(64)
        assert (alive.now, alive.peak) == (256, 1024)
        del c
    assert alive.now == 0


DECOMPOSED: dict[str, Callable[[], object]] = {
    "eigenvectors": lambda: torch.linalg.eigh(torch.rand(800, 800, dtype=torch.double)),
    "singular values": lambda: torch.linalg.svd(torch.rand(600, 900, dtype=torch.double), full_matrices=False),
}


def _decompose(what: str) -> int:
    return_blocks()
    DECOMPOSED[what]()
    settle()
    with measure("cpu") as cost:
        DECOMPOSED[what]()
    return cost.peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only there peaks can be reset")
def test_what_a_decomposition_works_on_is_counted(clean: Callable[..., Any]) -> None:
    measured = {what: clean(partial(_decompose, what)) for what in DECOMPOSED}
    for what, decompose in DECOMPOSED.items():
        with fake_tensors(), Alive() as alive:
            decompose()
        assert alive.peak == pytest.approx(measured[what], rel=0.15), what


def test_a_product_that_is_added_in_place_is_a_product() -> None:
    with Alive() as alive:
        square = torch.ones(4, 4)
        square.addmm_(square.clone(), square.clone())
    assert alive.flops[torch.float32] == 2 * 4**3


def test_products_and_other_work_are_told_apart() -> None:
    with fake_tensors(), Alive() as alive:
        a = torch.empty(8, 16) @ torch.empty(16, 4)
        assert alive.flops == {torch.float32: 2 * 8 * 16 * 4}
        alive.moved.clear()
        a.add(1.0)
        assert alive.moved == {torch.float32: 2 * 8 * 4 * 4}
        a.bfloat16() @ torch.empty(4, 2, dtype=torch.bfloat16)
        assert alive.flops == {torch.float32: 2 * 8 * 16 * 4, torch.bfloat16: 2 * 8 * 4 * 2}


@pytest.mark.parametrize(
    ("step", "family"),  # whose blocks are all alike
    [("couple, feedback", "gpt2"), ("couple, backprop", "llama"), ("evaluate", "gpt2"), ("score", "llama")],
)
def test_what_a_step_reads_from_disk_is_predicted(step: str, family: str, tmp_path: Path) -> None:
    """But for one block: a trace begins with none in place."""
    case = with_top(case_of(family, streamed=True, at_once=0), step)
    real = STEPS[step](replace(case, weights=str(write_weights(case, tmp_path / "weights"))))
    (window,) = (window for model, _ in real.marks if (window := window_of(model)) is not None)
    real.work()
    before = window.reads
    real.work()
    block = sum(absent.numel() * absent.itemsize for absent, _ in window.blocks[-1])
    assert window.reads - before >= sum(case.layers.values())
    assert predict(case, STEPS[step]).read == pytest.approx((window.reads - before) * block, abs=block)


def test_a_step_that_runs_for_real_trains() -> None:
    step = STEPS["couple, feedback"](with_top(case_of("gpt2"), "couple, feedback"))
    assert isinstance(step, Step)
    step.work()
    assert step.trained > 0
