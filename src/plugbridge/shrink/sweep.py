"""Many rows through a model block by block, so that a streamed model is read once for all of them.

Between its blocks the model's own code runs. To take a row through block b, the model is called as ever; the blocks
before b only play back what they gave before, and the call is broken off behind b.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
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
Run = Callable[["Block", Slots], Any]
"""A block's own output, given its arguments."""
Opened = Callable[[nn.Module, "Block"], AbstractContextManager[Any]]
"""Has a block's parameters in place while it lasts."""
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

    An argument that an earlier block gave is the same object as that output. Of a block that no gradient reaches, since
    nothing in it or before it trains, nothing is kept.
    """

    last: dict[str, Any] = field(default_factory=dict[str, Any])
    arguments: list[Slots] = field(default_factory=list[Slots])
    outputs: list[Outputs] = field(default_factory=list[Outputs])
    reached: set[int] = field(default_factory=set[int])

    def reaches(self, block: Block) -> bool:
        """Whether a gradient reaches what a block that the row is through gave."""
        return bool(self.outputs[block.number])


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
    model: nn.Module,
    blocks: Sequence[Block],
    calls: Sequence[Call],
    shelf: Shelf | None,
    opened: Opened | None = None,
    runs: Sequence[Run] | None = None,
) -> list[Passage]:
    """Take all rows through all blocks; every block's arguments and outputs are kept, in memory or on the shelf.

    `opened` has a block in place, with gradients of all its parameters unless told; a row's blocks are run as its entry
    of `runs` says.
    """
    passages = [Passage() for _ in calls]
    for live in blocks:
        with (opened or all_train)(model, live):
            for passage, call, run in zip(passages, calls, runs or [run_block] * len(calls), strict=True):
                with taken_out(shelf, passage.last, passage.arguments[-1:]) as out:
                    _advance(blocks, live, passage, call, partial(_keep, passage, run))
                    out.extend(tensors_in([passage.last, passage.arguments[-1], passage.outputs[-1]]))
    return passages


def put_in_place(model: nn.Module, block: Block) -> None:
    """Read a block from disk where the model is streamed."""
    window = window_of(model)
    if window is not None:
        window.need(block.number)


@contextmanager
def all_train(model: nn.Module, block: Block) -> Generator[dict[str, nn.Parameter]]:
    """A block's parameters by name, in place and taking gradients while this lasts."""
    put_in_place(model, block)
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
    """Take one row through one more block.

    What lies between the blocks has a graph where a gradient will reach it, so that arguments made of it can be told.
    """
    leaves: dict[int, Tensor] = {}
    own: dict[int, Any] = {}

    def leaf(output: Any) -> Any:
        if id(output) not in passage.reached:
            return output
        found = leaves.setdefault(id(output), output.detach().requires_grad_(True))
        own[id(found)] = output
        return found

    def play(block: Block, slots: Slots) -> Any:
        if block is live:
            passage.last[block.stack] = step(block, {key: own.get(id(value), value) for key, value in slots.items()})
            raise _Reached
        last = passage.last[block.stack]
        return tuple(map(leaf, last)) if isinstance(last, tuple) else leaf(last)

    with played(blocks, play), torch.set_grad_enabled(bool(passage.reached)):
        try:
            call()
        except _Reached:
            return
    raise AssertionError(f"the model did not call its block '{live.path}'")


def _keep(passage: Passage, run: Run, block: Block, slots: Slots) -> Any:
    """A block's output, kept with its arguments.

    It runs with a graph, which is dropped: torch takes other attention kernels without one, which round otherwise.
    """
    leaves = {
        key: value.detach().requires_grad_(True)
        for key, value in slots.items()
        if isinstance(value, Tensor) and (id(value) in passage.reached or value.requires_grad)
    }
    with torch.enable_grad():
        output = run(block, {**slots, **leaves})
    same = {id(leaf): slots[key] for key, leaf in leaves.items()}
    kept: list[Any] = []
    reached = False
    for out in as_tuple(output):
        kept.append(same[id(out)] if id(out) in same else out.detach() if isinstance(out, Tensor) else out)
        if isinstance(out, Tensor) and out.requires_grad:
            passage.reached.add(id(kept[-1]))
            reached = True
    passage.arguments.append(_kept(slots, passage) if reached else {})
    passage.outputs.append(tuple(kept) if reached else ())
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
