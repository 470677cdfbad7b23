"""From scores to a plan of the Bridge: how large it is, and which units stay.

Residual-consistent: one set of hidden channels for the whole model, whole heads, MLP rows and
columns together. Scores are sums, so an axis shared by many weights is ranked by all of them.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout, Place, check_constraints
from plugbridge.shrink.importance import Scores, scope_key
from plugbridge.tensors.axes import Op, Project, Select, axis_names, shape_of


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


def reduced_sizes(layout: Layout, reduction: float) -> dict[str, int]:
    """Axis sizes after dividing every prunable axis by `reduction` (Jin et al. 2023: d/r).

    Rounded to whole units, at least one; where transformers ties sizes together
    (`constraints`), the left side of the constraint follows the right one.
    Raises ConfigError for a reduction below 1.
    """
    if reduction < 1:
        raise ConfigError(f"reduction is {reduction} but must be at least 1")
    sizes = dict(layout.sizes)
    for axis in layout.family.scope:
        sizes[axis] = max(1, round(layout.sizes[axis] / reduction))
    for left, right in layout.family.constraints.equal:
        if left in sizes:
            sizes[left] = math.prod(sizes[name] for name in right.split())
    for left, right in layout.family.constraints.divisible:
        unit = math.prod(sizes[name] for name in right.split())
        sizes[left] = unit * math.ceil(sizes[left] / unit)
    broken = check_constraints(layout.family, sizes)
    if broken:
        raise ConfigError(f"no Bridge of this family at reduction {reduction}: {broken}")
    return sizes


def count_parameters(layout: Layout, names: set[str], sizes: Mapping[str, int]) -> int:
    """Parameters of a model that has the weights `names` at these axis sizes."""
    return sum(math.prod(shape_of(weight.pattern, sizes)) for weight in layout.weights() if weight.name in names)


def budgeted_sizes(layout: Layout, names: set[str], budget: int) -> dict[str, int]:
    """The widest axis sizes, all axes reduced alike, whose parameters fit the budget.

    Raises ConfigError if even one unit per axis does not fit.
    """
    widest = max(layout.sizes[axis] for axis in layout.family.scope)
    reductions = sorted({layout.sizes[a] / k for a in layout.family.scope for k in _units(layout.sizes[a])})
    reductions.append(float(2 * widest))

    def count(reduction: float) -> int:
        return count_parameters(layout, names, reduced_sizes(layout, max(1.0, reduction)))

    first = bisect_left(reductions, True, key=lambda reduction: count(reduction) <= budget)  # no axis grows with it
    if first == len(reductions):
        smallest = count(reductions[-1])
        raise ConfigError(
            f"a budget of {budget} parameters is too small: the smallest Bridge of this model has {smallest}"
        )
    return reduced_sizes(layout, max(1.0, reductions[first]))


def _units(size: int) -> list[float]:
    """Just past every rounding border of `round(size / r)`, widest first."""
    step = max(1, size // 512)
    return [units - 0.499 for units in range(size, 0, -step)] + [float(size)]


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
