"""Many rows through a model block by block, so that a streamed model is read once for all of them.

Between its blocks the model's own code runs. To take a row through block b, the model is called as ever; the blocks
before b only play back what they gave before, and the call is broken off behind b.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from plugbridge.families.spec import Layout
from plugbridge.shrink.shelf import Shelf, taken_out, tensors_in
from plugbridge.streaming import window_of

Call = Callable[[], Any]
"""One row's run of the model."""
Slots = dict[int | str, Any]
"""A block's arguments: positional ones by number, others by name."""
Done = Callable[["Block"], None]
"""Told of every block that all rows are through."""
Outputs = tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """One block in the order in which they run: its number, stack and path, and the module."""

    number: int
    stack: str
    path: str
    module: nn.Module


@dataclass
class Passage:
    """What a row leaves behind: the last output of each stack, and where they are kept every block's arguments and
    outputs, with the identities of the outputs that a gradient can reach.

    An argument that an earlier block gave is the same object as that output.
    """

    last: dict[str, Any] = field(default_factory=dict[str, Any])
    arguments: list[Slots] = field(default_factory=list[Slots])
    outputs: list[Outputs] = field(default_factory=list[Outputs])
    reached: set[int] = field(default_factory=set[int])


class _Reached(Exception):
    """The row is through the block it was run for."""


def blocks_of(model: nn.Module, layout: Layout) -> list[Block]:
    """All blocks in the order in which they run."""
    found: list[Block] = []
    for name, stack in layout.family.stack.items():
        for layer in range(layout.layers[name]):
            path = stack.path.format(layer)
            found.append(Block(len(found), name, path, model.get_submodule(path)))
    return found


@contextmanager
def played(blocks: Sequence[Block], play: Callable[[Block, Slots], Any]) -> Generator[None]:
    """While this lasts, `play` gives the output of every block. Their hooks run as ever."""

    def forward(block: Block) -> Callable[..., Any]:
        return lambda *args, **keywords: play(block, {**dict(enumerate(args)), **keywords})

    for block in blocks:
        block.module.forward = forward(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward


def run_block(block: Block, slots: Slots) -> Any:
    """A block's own output."""
    args = [value for key, value in slots.items() if isinstance(key, int)]
    keywords = {key: value for key, value in slots.items() if isinstance(key, str)}
    return type(block.module).forward(cast(Any, block.module), *args, **keywords)


def _run_detached(block: Block, slots: Slots) -> Any:
    """A block's own output, as tensors that nobody else knows."""
    output = run_block(block, slots)
    found = tuple(out.detach() if isinstance(out, Tensor) else out for out in as_tuple(output))
    return found if isinstance(output, tuple) else found[0]


def as_tuple(output: Any) -> Outputs:
    """A block's output as a tuple, whatever the family returns."""
    return cast(Outputs, output) if isinstance(output, tuple) else (output,)


@torch.no_grad()
def sweep(
    blocks: Sequence[Block], calls: Sequence[Call], shelf: Shelf | None = None, done: Done = lambda _block: None
) -> None:
    """Take all rows through the model, one block after another, and through what comes behind the last one.

    With a shelf no more than one row's states are in memory.
    """
    passages = [Passage() for _ in calls]
    for live in blocks:
        for passage, call in zip(passages, calls, strict=True):
            with taken_out(shelf, passage.last) as out:
                _advance(blocks, live, passage, call, _run_detached)
                out.extend(tensors_in(passage.last))
        done(live)
    for passage, call in zip(passages, calls, strict=True):
        with taken_out(shelf, passage.last):
            with played(blocks, lambda block, _slots, passage=passage: passage.last[block.stack]):
                call()


@torch.no_grad()
def sweep_keeping(
    model: nn.Module, blocks: Sequence[Block], calls: Sequence[Call], shelf: Shelf | None
) -> list[Passage]:
    """Take all rows through all blocks; every block's arguments and outputs are kept, in memory or on the shelf."""
    passages = [Passage() for _ in calls]
    for live in blocks:
        with opened(model, live):
            for passage, call in zip(passages, calls, strict=True):
                with taken_out(shelf, passage.last, passage.arguments[-1:]) as out:
                    _advance(blocks, live, passage, call, partial(_keep, passage))
                    out.extend(tensors_in([passage.arguments[-1], passage.outputs[-1]]))
    return passages


@contextmanager
def opened(model: nn.Module, block: Block) -> Generator[dict[str, nn.Parameter]]:
    """A block's parameters by name, in place and taking gradients while this lasts."""
    window = window_of(model)
    if window is not None:
        window.need(block.number)
    parameters = {f"{block.path}.{name}": p for name, p in block.module.named_parameters()}
    with training(parameters.values()):
        yield parameters


@contextmanager
def training(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Parameters take gradients while this lasts."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _advance(
    blocks: Sequence[Block], live: Block, passage: Passage, call: Call, step: Callable[[Block, Slots], Any]
) -> None:
    """Take one row through one more block."""

    def play(block: Block, slots: Slots) -> Any:
        if block is live:
            passage.last[block.stack] = step(block, slots)
            raise _Reached
        return passage.last[block.stack]

    with played(blocks, play):
        try:
            call()
        except _Reached:
            return
    raise AssertionError(f"the model did not call its block '{live.path}'")


def _keep(passage: Passage, block: Block, slots: Slots) -> Any:
    """A block's output, kept with its arguments.

    It runs with a graph, which is dropped: torch takes other attention kernels without one, which round otherwise.
    """
    leaves = {key: value.detach().requires_grad_(True) for key, value in slots.items() if id(value) in passage.reached}
    with torch.enable_grad():
        output = run_block(block, {**slots, **leaves})
    same = {id(leaf): slots[key] for key, leaf in leaves.items()}
    kept: list[Any] = []
    for out in as_tuple(output):
        kept.append(same[id(out)] if id(out) in same else out.detach() if isinstance(out, Tensor) else out)
        if isinstance(out, Tensor) and out.requires_grad:
            passage.reached.add(id(kept[-1]))
    passage.arguments.append(_kept(slots, passage))
    passage.outputs.append(tuple(kept))
    return tuple(kept) if isinstance(output, tuple) else kept[0]


def _kept(slots: Slots, passage: Passage) -> Slots:
    """Arguments to run a block again: without a cache, and shared with the block before where nothing has changed."""
    before: Slots = passage.arguments[-1] if passage.arguments else {}
    found: Slots = {}
    for key, value in slots.items():
        if isinstance(value, Cache):
            found[key] = None
        else:
            found[key] = value if id(value) in passage.reached else _shared(value, before.get(key))
    return found


def _shared(value: Any, before: Any) -> Any:
    """`before` where it equals `value`, also inside of a tuple; else tensors that nobody else knows."""
    if isinstance(value, tuple):
        new, old = cast(Outputs, value), cast(Outputs, before) if isinstance(before, tuple) else ()
        return tuple(_shared(part, old[i] if i < len(old) else None) for i, part in enumerate(new))
    if not isinstance(value, Tensor):
        return value
    same = isinstance(before, Tensor) and value.shape == before.shape and torch.equal(value, before)
    return before if same else value.detach()
