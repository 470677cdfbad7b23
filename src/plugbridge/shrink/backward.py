"""Errors back through a model block by block, each block run again with a graph: one of them in memory at a time.

Forward, every row's arguments at every block are kept (`sweep`). Backward, from the last block to the first, each block
is run again, once a row, and the gradients of its arguments are what the blocks before it get. What lies between the
blocks (embeddings, final norms, head) is run with every block played back, once a stack, for the error at its end.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from plugbridge.shrink.shelf import Shelf, taken_out
from plugbridge.shrink.sweep import Block, Call, Passage, Run, Slots, as_tuple, played, run_block


@dataclass
class Ledger:
    """Gradients at a row's kept tensors, by the tensor itself."""

    found: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add what one more reader of the tensor sends back."""
        key = id(tensor)
        self.found[key] = self.found[key] + gradient if key in self.found else gradient

    def get(self, tensor: Any) -> Tensor | None:
        """What all readers so far sent back."""
        return self.found.get(id(tensor))

    def take(self, tensor: Any) -> Tensor | None:
        """The same, and it is struck out."""
        return self.found.pop(id(tensor), None)


@dataclass
class Row:
    """One sample on its way back: how to run it, what it left, and the gradients at that."""

    call: Call
    passage: Passage
    run: Run = run_block
    ledger: Ledger = field(default_factory=Ledger)
    wanted: set[int] = field(default_factory=set[int])  # kept tensors whose gradient goes further


@dataclass(frozen=True)
class Frame:
    """A row's graph outside of the blocks: its value, the blocks' arguments that come from there rather than from a
    block, each with the kept tensor, and every block's outputs as leaves, by stack, each with the kept tensor."""

    value: Tensor
    entries: list[tuple[Tensor, Tensor]]
    leaves: dict[str, list[tuple[Tensor, Tensor]]]

    def roots(self, ledger: Ledger) -> tuple[list[Tensor], list[Tensor]]:
        """Where gradients come in, and those that are known: the value's own, and what blocks have sent back."""
        known = [(entry, found) for entry, kept in self.entries if (found := ledger.get(kept)) is not None]
        return [self.value, *(e for e, _ in known)], [torch.ones_like(self.value), *(g for _, g in known)]


@contextmanager
def at_hand(shelf: Shelf | None, row: Row, kept: object) -> Generator[None]:
    """Some of what a row has kept, and its gradients, while this lasts."""
    with taken_out(shelf, kept, row.ledger.found) as out:
        yield
        out.extend(row.ledger.found.values())


def frame_of(blocks: Sequence[Block], row: Row) -> Frame:
    """Run a row with a graph, every block played back."""
    entries: dict[int, tuple[Tensor, Tensor]] = {}
    leaves: dict[str, list[tuple[Tensor, Tensor]]] = {}
    own: set[int] = set()

    def play(block: Block, slots: Slots) -> Any:
        if not row.passage.reaches(block):
            return row.passage.last[block.stack]
        kept = row.passage.arguments[block.number]
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.requires_grad and id(value) not in own:
                entries[id(kept[key])] = (value, kept[key])
        outputs = row.passage.outputs[block.number]
        reached = row.passage.reached
        given = tuple(out.detach().requires_grad_(True) if id(out) in reached else out for out in outputs)
        pairs = [(leaf, out) for leaf, out in zip(given, outputs, strict=True) if id(out) in reached]
        leaves.setdefault(block.stack, []).extend(pairs)
        own.update(id(leaf) for leaf, _ in pairs)
        return given if isinstance(row.passage.last[block.stack], tuple) else given[0]

    with torch.enable_grad(), played(blocks, play):
        value = row.call()
    row.wanted = {*entries, *row.passage.reached}
    return Frame(value, list(entries.values()), leaves)


def enter(stack: str, frame: Frame, ledger: Ledger) -> None:
    """Bring the gradients from behind a stack to the outputs of its blocks."""
    roots, known = frame.roots(ledger)
    leaves = frame.leaves.get(stack, [])
    gradients = torch.autograd.grad(roots, [leaf for leaf, _ in leaves], known, allow_unused=True)
    for (_, kept), gradient in zip(leaves, cast(Sequence[Tensor | None], gradients), strict=True):
        if gradient is not None:
            ledger.add(kept, gradient)


def send_back(block: Block, row: Row, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of a block's parameters for one row; those of its arguments go to the row's ledger."""
    kept = row.passage.arguments[block.number]
    inputs = {key: value.detach().requires_grad_(True) for key, value in kept.items() if id(value) in row.wanted}
    with torch.enable_grad():
        outputs = as_tuple(row.run(block, {**kept, **inputs}))
    roots: list[Tensor] = []
    known: list[Tensor] = []
    for output, old in zip(outputs, row.passage.outputs[block.number], strict=True):
        found = row.ledger.take(old)
        if found is not None:
            roots.append(output)
            known.append(found)
    gradients = torch.autograd.grad(roots, [*parameters, *inputs.values()], known, materialize_grads=True)
    for key, gradient in zip(inputs, gradients[len(parameters) :], strict=True):
        row.ledger.add(kept[key], gradient)
    return gradients[: len(parameters)]
