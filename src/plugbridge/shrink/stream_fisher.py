"""Fisher information of a model whose blocks are on disk: the same scores, with one block in memory at a time.

Errors go back as `backward` says; every block's squared gradients are reduced to the units' scores at once, a row at a
time. What lies between the blocks is run once more at last, for its own weights. Embeddings and heads never have a
gradient of their size (`vocabulary`).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from plugbridge.families.spec import Layout, Weight
from plugbridge.shrink.backward import Row, at_hand, enter, frame_of, send_back
from plugbridge.shrink.importance import LogLikelihood, Scores, add_scores, on_cpu, squared
from plugbridge.shrink.shelf import Shelf
from plugbridge.shrink.sweep import Block, Done, all_train, blocks_of, sweep_keeping, training
from plugbridge.shrink.vocabulary import add_squares, vocabulary_modules, watched


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
                with at_hand(shelf, row, row.passage.last), watched(model, layout):
                    enter(stack, frame_of(blocks, row), row.ledger)
        for block in reversed([block for block in blocks if block.stack == stack]):
            with all_train(model, block) as parameters:
                for row in rows:
                    with at_hand(shelf, row, row.passage.arguments[block.number]):
                        gradients = send_back(block, row, list(parameters.values()))
                    _add_squares(scores, layout, table, parameters, gradients)
            done(block)
    with training(outside.values()):
        for row in rows:
            with at_hand(shelf, row, row.passage.last), watched(model, layout) as vocabulary:
                roots, known = frame_of(blocks, row).roots(row.ledger)
                uses = list(vocabulary.values())
                wanted = [*outside.values(), *(tensor for use in uses for tensor in use.tensors())]
                gradients = torch.autograd.grad(roots, wanted, known, materialize_grads=True)
                add_squares(scores, layout, uses, gradients[len(outside) :])
            _add_squares(scores, layout, table, outside, gradients[: len(outside)])


def _add_squares(
    scores: Scores,
    layout: Layout,
    table: Mapping[str, Weight],
    parameters: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor],
) -> None:
    for name, gradient in zip(parameters, gradients, strict=True):
        add_scores(scores, layout, table[name], squared(gradient))
