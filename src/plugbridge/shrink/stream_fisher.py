"""Fisher information of a model whose blocks are on disk: the same scores, with one block in memory at a time.

Forward, every row's arguments at every block are kept. Backward, from the last block to the first, each block is run
again with a graph, once a row; its squared gradients are reduced to the units' scores at once, and the gradients of its
arguments are what the blocks before it get. What lies between the blocks (embeddings, final norms, head) is run with
every block played back: once a stack for the error at its end, and at last for its own weights. Embeddings and heads
never have a gradient of their size (`vocabulary`).
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from plugbridge.families.spec import Layout, Weight
from plugbridge.shrink.importance import LogLikelihood, Scores, add_scores, on_cpu, squared
from plugbridge.shrink.shelf import Shelf, taken_out
from plugbridge.shrink.sweep import (
    Block,
    Call,
    Done,
    Passage,
    Slots,
    as_tuple,
    blocks_of,
    opened,
    played,
    run_block,
    sweep_keeping,
    training,
)
from plugbridge.shrink.vocabulary import add_squares, vocabulary_modules, watched


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


def streamed_fisher(
    model: nn.Module,
    layout: Layout,
    samples: Iterable[Any],
    log_likelihood: LogLikelihood,
    chunk: int,
    shelf: Shelf | None = None,
    done: Done = lambda _block: None,
) -> Scores:
    """What `importance.fisher` returns, block by block.

    `chunk` is how many samples have their activations kept at a time, in memory or on the shelf; for each chunk every
    block is read twice, and `done` told of it.
    """
    scores: Scores = {}
    blocks = blocks_of(model, layout)
    inside = {id(p) for block in blocks for p in block.module.parameters()}
    inside |= {id(module.get_parameter("weight")) for module in vocabulary_modules(model, layout).values()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    todo, count = iter(samples), 0
    while some := list(islice(todo, chunk)):
        calls = [partial(log_likelihood, sample) for sample in some]
        rows = [Row(*pair) for pair in zip(calls, sweep_keeping(model, blocks, calls, shelf), strict=True)]
        _add_rows(model, layout, blocks, outside, rows, scores, shelf, done)
        count += len(some)
    return on_cpu({key: value / count for key, value in scores.items()})


def _add_rows(
    model: nn.Module,
    layout: Layout,
    blocks: Sequence[Block],
    outside: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    scores: Scores,
    shelf: Shelf | None,
    done: Done,
) -> None:
    table = layout.table()
    for stack in reversed(layout.family.stack):
        with training(outside.values()):
            for row in rows:
                with _at_hand(shelf, row, row.passage.last), watched(model, layout):
                    _enter(stack, frame_of(blocks, row), row.ledger)
        for block in reversed([block for block in blocks if block.stack == stack]):
            with opened(model, block) as parameters:
                for row in rows:
                    with _at_hand(shelf, row, row.passage.arguments[block.number]):
                        gradients = _send_back(block, row, list(parameters.values()))
                    _add_squares(scores, layout, table, parameters, gradients)
            done(block)
    with training(outside.values()):
        for row in rows:
            with _at_hand(shelf, row, row.passage.last), watched(model, layout) as vocabulary:
                roots, known = frame_of(blocks, row).roots(row.ledger)
                uses = list(vocabulary.values())
                wanted = [*outside.values(), *(tensor for use in uses for tensor in use.tensors())]
                gradients = torch.autograd.grad(roots, wanted, known, materialize_grads=True)
                add_squares(scores, layout, uses, gradients[len(outside) :])
            _add_squares(scores, layout, table, outside, gradients[: len(outside)])


@contextmanager
def _at_hand(shelf: Shelf | None, row: Row, kept: object) -> Generator[None]:
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


def _enter(stack: str, frame: Frame, ledger: Ledger) -> None:
    """Bring the gradients from behind a stack to the outputs of its blocks."""
    roots, known = frame.roots(ledger)
    leaves = frame.leaves[stack]
    gradients = torch.autograd.grad(roots, [leaf for leaf, _ in leaves], known, allow_unused=True)
    for (_, kept), gradient in zip(leaves, cast(Sequence[Tensor | None], gradients), strict=True):
        if gradient is not None:
            ledger.add(kept, gradient)


def _send_back(block: Block, row: Row, parameters: list[nn.Parameter]) -> Sequence[Tensor]:
    """Gradients of a block's parameters for one row; those of its arguments go to the row's ledger."""
    kept = row.passage.arguments[block.number]
    inputs = {key: value.detach().requires_grad_(True) for key, value in kept.items() if id(value) in row.wanted}
    with torch.enable_grad():
        outputs = as_tuple(run_block(block, {**kept, **inputs}))
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


def _add_squares(
    scores: Scores,
    layout: Layout,
    table: Mapping[str, Weight],
    parameters: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor],
) -> None:
    for name, gradient in zip(parameters, gradients, strict=True):
        add_scores(scores, layout, table[name], squared(gradient))
