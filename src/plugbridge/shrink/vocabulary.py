"""Squared gradients of the vocabulary's weights, summed per channel, without the gradients.

The gradient of an embedding or a head is as large as the weight, for a large vocabulary much larger than a block. But
it is a sum of few outer products: one for every position where the head is read, and one row for every token that is
looked up. With states s (P, hidden) and the loss's gradients d (P, vocab) at the head's logits,

    sum over the vocabulary of (d^T s)^2 = sum over p, q of (d d^T)[p, q] s[p] s[q],

and the tokens' rows are added where they are. This is exact, and covers weights that are both.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plugbridge.families.spec import Layout
from plugbridge.shrink.importance import Scores, scope_key

PATTERN = "vocab hidden"


@dataclass
class Uses:
    """Where one weight was read: (tokens, looked up), and (states, logits) at a head."""

    name: str
    lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    heads: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def tensors(self) -> list[Tensor]:
        """What gradients are needed of: everything looked up, then the heads' logits."""
        return [value for _, value in (*self.lookups, *self.heads)]

    def squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """The weight's squared gradient summed over the vocabulary, given those of `tensors`. Returns (hidden,)."""
        first = len(self.lookups)
        rows = [gradient.flatten(0, -2) for gradient in gradients[:first]]
        tokens = [ids.flatten() for ids, _ in self.lookups]
        errors = [gradient.flatten(0, -2) for gradient in gradients[first:]]
        states = [state.flatten(0, -2) for state, _ in self.heads]
        total = torch.zeros((), dtype=torch.double, device=(rows + states)[0].device)
        error = state = None
        if errors:
            error, state = torch.cat(errors), torch.cat(states)
            read = error.abs().amax(1) > 0  # most positions have no label
            error, state = error[read].double(), state[read].double()
            total = total + ((error @ error.mT @ state) * state).sum(0)
        if rows:
            kinds, sums = sums_by_token(torch.cat(tokens), torch.cat(rows).double())
            beside = 0.0 if error is None or state is None else 2 * (error[:, kinds].mT @ state)
            total = total + (sums * (sums + beside)).sum(0)
        return total


def sums_by_token(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal tokens added up. (n,), (n, d) -> (n,) tokens and (n, d) sums; what is left over is zero.

    As many as there were, so that shapes do not depend on values.
    """
    ordered, order = tokens.sort(stable=True)
    new = torch.ones_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).long()
    group = new.cumsum(0) - 1
    kinds = torch.zeros_like(ordered).scatter_(0, group, ordered)
    return kinds, torch.zeros_like(rows).index_add_(0, group, rows[order])


def vocabulary_modules(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """Embeddings and heads that are covered here, by the name of their weight; others are left to autograd.

    A weight is covered with all that read it or not at all.
    """
    table = layout.table()
    found: dict[str, nn.Module] = {}
    left: set[int] = set()
    for name in sorted(layout.vocabulary()):
        path = name.removesuffix(".weight")
        if path == name or table[name].pattern != PATTERN or table[name].place.stack is not None:
            continue
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            covered = module.max_norm is None and not module.scale_grad_by_freq
        else:
            covered = isinstance(module, nn.Linear) and getattr(module, "bias", None) is None
        if covered:
            found[name] = module
        else:
            left.add(id(module.get_parameter("weight")))
    return {name: module for name, module in found.items() if id(module.get_parameter("weight")) not in left}


@contextmanager
def watched(model: nn.Module, layout: Layout) -> Generator[dict[int, Uses]]:
    """While this lasts, every use of a vocabulary's weight is noted, by the weight's id.

    What is looked up is a leaf of the graph, whose gradient can be asked for without the weight's.
    """
    uses: dict[int, Uses] = {}
    distinct = {id(module): (name, module) for name, module in vocabulary_modules(model, layout).items()}

    def on_lookup(found: Uses, padding: int | None) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_(True)
            # torch gives a padding token's row no gradient
            value = leaf if padding is None else leaf.where((inputs[0] != padding)[..., None], leaf.detach())
            found.lookups.append((inputs[0], leaf))
            return value

        return hook

    def on_head(found: Uses) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            found.heads.append((inputs[0].detach(), output))

        return hook

    with ExitStack() as hooks:
        for name, module in distinct.values():
            found = uses.setdefault(id(module.get_parameter("weight")), Uses(name))
            hook = on_lookup(found, module.padding_idx) if isinstance(module, nn.Embedding) else on_head(found)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield uses


def add_squares(scores: Scores, layout: Layout, uses: Sequence[Uses], gradients: Sequence[Tensor]) -> None:
    """Add the weights' squared gradients to the channels' scores, given the gradients of all uses' tensors in order."""
    table, at = layout.table(), 0
    for use in uses:
        own = gradients[at : at + len(use.tensors())]
        at += len(own)
        key = scope_key(layout, "hidden", table[use.name].place)
        if own and key is not None:
            part = use.squares(own)
            scores[key] = scores[key] + part if key in scores else part
