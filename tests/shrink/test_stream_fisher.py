"""Scores from blocks on disk are those of the whole model in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, make_model, token_inputs
from plugbridge.models import layout_for
from plugbridge.shrink.importance import (
    fisher,
    record_second_moments,
    residual_energy,
)
from plugbridge.shrink.shelf import Shelf
from plugbridge.shrink.stream_fisher import streamed_fisher
from plugbridge.shrink.sweep import blocks_of, sweep
from plugbridge.streaming import Absent
from test_streaming import resident, streamed


def samples_of(model, count: int = 3) -> list[dict[str, Tensor]]:
    """Rows of several lengths."""
    found = [token_inputs(model, rows=1, length=5 + i, seed=i) for i in range(count)]
    for sample in found:
        sample["attention_mask"].fill_(1)
    return found


def likelihood(model) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda sample: torch.log_softmax(model(**sample).logits[0, -1], -1)[4]


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() != set()
    for key, values in wanted.items():
        scale = float(values.abs().max())
        assert scale > 0, key
        assert float((found[key] - values).abs().max()) <= 1e-6 * scale, key
        assert torch.allclose(found[key], values, rtol=2e-6, atol=1e-9 * scale), key


@pytest.mark.parametrize(("chunk", "keep"), [(2, "memory"), (5, "memory"), (2, "disk"), (5, "disk")])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_fisher_is_the_whole_models(
    sharded: Callable[[str], Path], tmp_path: Path, family: str, chunk: int, keep: str
) -> None:
    plain, (model, layout, window) = resident(sharded(family)), streamed(sharded(family))
    shelf = Shelf(tmp_path / "states") if keep == "disk" else None
    with record_second_moments(plain, layout) as moments:
        wanted = fisher(plain, layout, samples_of(plain), likelihood(plain))
    with record_second_moments(model, layout) as found_moments:
        done = (lambda block: found_moments.finish(block.path)) if chunk == 5 else (lambda _block: None)
        found = streamed_fisher(model, layout, samples_of(model), likelihood(model), chunk, shelf, done)
    assert_near(found, wanted)
    if shelf is not None:
        memory = streamed_fisher(model, layout, samples_of(model), likelihood(model), chunk)
        assert all(torch.equal(found[key], memory[key]) for key in memory)
        window.reads //= 2
    error, found_error = moments.total("error"), found_moments.total("error")
    assert error is not None
    assert found_error is not None
    assert torch.allclose(found_error, error, rtol=1e-5, atol=1e-7)
    chunks, blocks = -(-3 // chunk), sum(layout.layers.values())
    assert window.reads <= chunks * 2 * blocks + 2
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_it_is_the_same_to_the_last_digits(family: str) -> None:
    model = make_model(family).double()
    layout = layout_for(model)
    wanted = fisher(model, layout, samples_of(model), likelihood(model))
    found = streamed_fisher(model, layout, samples_of(model), likelihood(model), 2)
    for key, values in wanted.items():
        assert torch.allclose(found[key], values, rtol=1e-6), key


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_in_memory_at_a_time(sharded: Callable[[str], Path], family: str) -> None:
    model, layout, _ = streamed(sharded(family))
    table = layout.table()
    seen: list[int] = []

    def count(*_: object) -> None:
        here = {
            table[name].place
            for name, p in model.named_parameters()
            if p.dim() > 1 and not isinstance(p, Absent) and table[name].place.stack is not None
        }
        seen.append(len(here))

    for path, _ in layout.functions():
        model.get_submodule(path).register_forward_hook(count)
    streamed_fisher(model, layout, samples_of(model), likelihood(model), 3)
    assert set(seen) == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_is_the_forward_pass_of_every_row(sharded: Callable[[str], Path], family: str) -> None:
    """The energy, and what linear layers read, each block once for all rows."""
    plain, (model, layout, window) = resident(sharded(family)), streamed(sharded(family))
    blocks = blocks_of(model, layout)

    def all_rows(rows: list[dict[str, Tensor]]) -> None:
        sweep(blocks, [lambda row=row: model(**row) for row in rows])

    with record_second_moments(plain, layout) as wanted_activity:
        wanted = residual_energy(plain, layout, samples_of(plain), lambda s: plain(**s))
    with record_second_moments(model, layout) as activity:
        found = residual_energy(model, layout, [samples_of(model)], all_rows)
    assert_near(found, wanted)
    assert activity.sums.keys() == wanted_activity.sums.keys()
    for key, matrix in wanted_activity.sums.items():
        assert torch.allclose(activity.sums[key], matrix, rtol=1e-12), key
    assert window.reads <= sum(layout.layers.values()) + 1


def test_states_that_were_cut_short_are_not_made_up(tmp_path: Path) -> None:
    shelf, tensor = Shelf(tmp_path / "states"), torch.ones(1000)
    shelf.put(tensor)
    shelf.file.truncate(100)
    with pytest.raises(OSError, match="the kept states end after 100 of 4000 bytes"):
        shelf.take(tensor)
