"""Backpropagation block by block is autograd's, on every family and method, streamed and resident."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_coupling import double, tolerance_of
from test_transfer import ROWS, SETTINGS, coupling_of
from torch import Tensor

from conftest import FAMILIES, METHODS, pairwise
from plugbridge.evaluate import mean_loss
from plugbridge.models import DROPOUTS
from plugbridge.shrink.sweep import blocks_of
from plugbridge.streaming import Absent, window_of
from plugbridge.tasks.encode import Encoded, gold
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, silence
from plugbridge.tuners.module import attach, pack, parameter_name
from test_streaming import LAYERS, resident, streamed

MORE = [*ROWS, Encoded((8, 9, 10, 11), ((3, 1), (4, 1)), 1), Encoded((12,), ((3, 1), (4, 1)), 0), ROWS[1]]


def without_dropout(coupling: Coupling) -> Coupling:
    """The same, its large model's dropout at zero wherever the families keep it."""
    large = coupling.large_model
    assert large is not None
    for name in DROPOUTS:
        if hasattr(large.config, name):
            setattr(large.config, name, 0.0)
    for part in large.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0  # pyright: ignore[reportArgumentType]
    return coupling


def autograd(coupling: Coupling, rows: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    """A batch's loss and gradient through the whole model at once, as torch has them."""
    large = coupling.large_model
    assert large is not None
    wrapped, _ = attach(large, coupling.method, coupling.large, coupling.settings)
    wrapped.train()
    wide = {s: t if coupling.trains(s) else t.detach() for s, t in coupling.at_large_width().items()}
    state = pack(coupling.method, coupling.large, wide)
    replaced = {parameter_name(key): tensor for key, tensor in state.items()}
    batch = gold(coupling.encoder, rows)

    def forward(**inputs: Tensor):
        return torch.func.functional_call(wrapped, replaced, (), inputs)

    torch.manual_seed(7)
    loss = mean_loss(forward, batch, coupling.encoder.kind)
    loss.backward()
    return float(loss.detach()), {n: t.grad for n, t in coupling.parameters().items() if t.grad is not None}


def backprop(coupling: Coupling, rows: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    loss = MODES["backprop"].start(coupling)(rows)
    loss.backward()
    return float(loss.detach()), {n: t.grad for n, t in coupling.parameters().items() if t.grad is not None}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("family", "method", "how"), pairwise(FAMILIES, METHODS, ((True, None), (False, 2), (True, 2)))
)
def test_it_is_autograds(family: str, method: str, how: tuple[bool, int | None]) -> None:
    upper, micro_batch = how
    coupling, other = (without_dropout(double(family, method, upper=upper)) for _ in range(2))
    silence(coupling)
    silence(other)
    value, wanted = autograd(other, MORE)
    loss, found = backprop(replace(coupling, micro_batch=micro_batch), MORE)
    assert loss == pytest.approx(value, rel=1e-9 if family == "gpt2" else 1e-6)
    assert_near(found, wanted, tolerance_of(family))


def _streamed(folder: Path, family: str, method: str, **changes: Any) -> Coupling:
    """A coupling whose large model is read from disk."""
    plain = coupling_of(family, method, large_model=resident(folder))
    return without_dropout(replace(plain, large_model=streamed(folder)[0], train_bridge=False, **changes))


@pytest.mark.parametrize(("family", "method", "micro_batch"), pairwise(FAMILIES, METHODS, (2, None)))
def test_streamed_it_is_autograds_on_the_whole_model(
    sharded: Callable[[str], Path], family: str, method: str, micro_batch: int | None
) -> None:
    plain = resident(sharded(family))
    other = replace(coupling_of(family, method, large_model=plain), large_model=plain, train_bridge=False)
    value, wanted = autograd(without_dropout(other), MORE)
    coupling = _streamed(sharded(family), family, method, micro_batch=micro_batch)
    loss, found = backprop(coupling, MORE)
    assert loss == pytest.approx(value, rel=1e-6)
    assert found.keys() == wanted.keys() != set()
    whole, exact = (torch.cat([part[name].flatten() for name in wanted]) for part in (found, wanted))
    bound = 1e-6 if micro_batch is None else 3e-6  # sums over parts round otherwise
    assert float((whole - exact).norm()) <= bound * float(exact.norm())


@pytest.mark.parametrize(("family", "first"), [("gpt2", 0), ("gpt2", 1), ("t5", 0)])
def test_every_block_is_read_twice_a_step_whatever_the_parts(
    sharded: Callable[[str], Path], family: str, first: int
) -> None:
    """Less the two that are in place where the way turns; those below the first that trains once."""
    layers = dict.fromkeys(("encoder", "decoder") if family == "t5" else ("decoder",), first)
    coupling = _streamed(sharded(family), family, "lora", micro_batch=1, first=layers)
    silence(coupling)
    window = window_of(coupling.large_model)  # pyright: ignore[reportArgumentType]
    assert window is not None
    loss = MODES["backprop"].start(coupling)
    reads: list[int] = []
    for _ in range(5):
        before = window.reads
        loss(MORE).backward()
        reads.append(window.reads - before)
    blocks = LAYERS * len(layers)
    assert reads[0] <= 2 * blocks + 1
    assert reads[2:] == [(2 * blocks - first) - 1 - (first == 0)] * 3


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_one_block_is_in_place_at_a_time(sharded: Callable[[str], Path], family: str) -> None:
    coupling = _streamed(sharded(family), family, "lora", micro_batch=2)
    model, seen = coupling.large_model, set[int]()
    assert model is not None
    window = window_of(model)
    assert window is not None

    def look(*_: object) -> None:
        here = [any(not isinstance(getattr(*owners[0]), Absent) for _, owners in block) for block in window.blocks]
        seen.add(sum(here))

    for path, _ in coupling.large.functions():
        model.get_submodule(path).register_forward_hook(look)
    MODES["backprop"].start(coupling)(MORE).backward()
    assert seen == {1}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_dropped_numbers_are_the_same_on_the_way_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is autograd's through one pass that drops the same: in the module, in blocks and between them."""
    monkeypatch.setattr("plugbridge.transfer.backprop._new_seed", lambda: 7)
    found: list[tuple[float, dict[str, Tensor]]] = []
    for gradient in (backprop, _seeded_autograd):
        coupling = double(family, "lora", upper=False)
        coupling = replace(coupling, settings=replace(SETTINGS, dropout=0.2))
        found.append(gradient(coupling, MORE))
    still = without_dropout(double(family, "lora", upper=False))
    assert found[0][0] != pytest.approx(backprop(still, MORE)[0], rel=1e-3)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_near(found[0][1], found[1][1], tolerance_of(family))


def _seeded_autograd(coupling: Coupling, rows: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    """Autograd with numbers that are drawn anew from the seed between the blocks, and in each from the next seed."""
    large = coupling.large_model
    assert large is not None

    def seeded(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            with torch.random.fork_rng([]):
                torch.manual_seed(8 + number)
                return forward(*args, **keywords)

        return run

    for block in blocks_of(large, coupling.large):
        block.module.forward = seeded(block.module.forward, block.number)
    return autograd(coupling, rows)
