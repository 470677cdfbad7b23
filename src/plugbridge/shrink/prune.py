"""From scores to a plan of the Bridge: how large it is, and which units stay.

Residual-consistent: one set of hidden channels for the whole model, whole heads, MLP rows and
columns together. Scores are sums, so an axis shared by many weights is ranked by all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plugbridge.families.spec import Layout, Place
from plugbridge.shrink.importance import Scores, scope_key
from plugbridge.tensors.axes import Op, Project, Select
from plugbridge.tensors.patterns import axis_names


@dataclass(frozen=True)
class BridgePlan:
    """What a Bridge keeps: `sizes` of all axes, and kept positions per scored key, ascending.

    A key in `basis` is projected by an orthonormal (Bridge, large) matrix instead. A Bridge on a
    projected residual stream serves the feedback's backward pass; as a model by itself it is none,
    since norms do not commute with a rotation.
    """

    sizes: dict[str, int]
    keep: dict[str, Tensor]
    basis: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def to(self, device: str) -> "BridgePlan":
        """The same with its tensors on a device, so that no step copies them there."""
        keep = {key: index.to(device) for key, index in self.keep.items()}
        return BridgePlan(self.sizes, keep, {key: matrix.to(device) for key, matrix in self.basis.items()})

    def op(self, key: str) -> Op:
        """The selection or projection of one scored key."""
        return Project(self.basis[key]) if key in self.basis else Select(self.keep[key])

    def ops(self, layout: Layout, pattern: str, place: Place) -> dict[str, Op]:
        """The selections that apply to a tensor with these axes at this place."""
        found: dict[str, Op] = {}
        for axis in axis_names(pattern):
            key = scope_key(layout, axis, place)
            if key is not None:
                found[axis] = self.op(key)
        return found


def plan_bridge(layout: Layout, scores: Scores, sizes: Mapping[str, int]) -> BridgePlan:
    """Keep the best-scored units of every axis. Ties go to the lower position."""
    keep: dict[str, Tensor] = {}
    for key, values in scores.items():
        axis = key.partition("@")[0]
        order = torch.sort(values, descending=True, stable=True).indices
        keep[key] = order[: sizes[axis]].sort().values
    return BridgePlan(dict(sizes), keep)


def unit_sum(moments: Iterable[Tensor]) -> Tensor:
    """The sum of second moments, each (d, d) and scaled to a trace of one in place, with two of them in memory."""
    total: Tensor | None = None
    for matrix in moments:
        matrix.div_(matrix.trace())
        total = matrix if total is None else total.add_(matrix)
    assert total is not None
    return total


def principal_basis(moments: Tensor, size: int) -> Tensor:
    """The `size` leading eigenvectors of a second moment, as rows. moments: (d, d) -> (size, d)."""
    vectors = torch.linalg.eigh(moments.double()).eigenvectors[:, -size:]
    return vectors.flip(1).mT.float().contiguous()
