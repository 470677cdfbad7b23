"""How large a Bridge is: its axis sizes by a reduction of every axis, or by a budget of parameters."""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping

from plugbridge.config.stages import Axis
from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout, check_constraints
from plugbridge.tensors.patterns import shape_of


def reduced_sizes(layout: Layout, reduction: float, whole: Collection[Axis] = ()) -> dict[str, int]:
    """Axis sizes after dividing prunable axes by `reduction` (Jin et al. 2023: d/r), but those that stay `whole`.

    Rounded to whole units, at least one; where transformers ties sizes together (`constraints`), the left side of the
    constraint follows the right one. Where the left side stays whole, the right one does as well if the two are equal,
    and else has as many units as divide it.
    Raises ConfigError for a reduction below 1.
    """
    if reduction < 1:
        raise ConfigError(f"reduction is {reduction} but must be at least 1")
    kept = whole_axes(layout, whole)
    sizes = dict(layout.sizes)
    for axis in layout.family.scope:
        if axis not in kept:
            sizes[axis] = max(1, round(layout.sizes[axis] / reduction))
    for left, right in layout.family.constraints.equal:
        if left in sizes:
            sizes[left] = math.prod(sizes[name] for name in right.split())
    for left, right in layout.family.constraints.divisible:
        free = next((name for name in right.split() if name in layout.family.scope), None)
        while left in kept and free is not None and sizes[left] % math.prod(sizes[name] for name in right.split()):
            sizes[free] -= 1
        unit = math.prod(sizes[name] for name in right.split())
        sizes[left] = unit * math.ceil(sizes[left] / unit)
    broken = check_constraints(layout.family, sizes)
    if broken:
        raise ConfigError(f"no Bridge of this family at reduction {reduction}: {broken}")
    return sizes


def whole_axes(layout: Layout, whole: Collection[Axis]) -> set[str]:
    """The prunable axes that stay as they are: those named, heads of every kind, and what is tied to equal them."""
    kept = {axis for axis in layout.family.scope for name in whole if axis == name or axis.endswith(f"_{name}")}
    for left, right in layout.family.constraints.equal:
        tied = {axis for axis in right.split() if axis in layout.family.scope}
        if left in kept or tied <= kept:
            kept |= {left, *tied}
    return kept


def count_parameters(layout: Layout, names: set[str], sizes: Mapping[str, int]) -> int:
    """Parameters of a model that has the weights `names` at these axis sizes."""
    return sum(math.prod(shape_of(weight.pattern, sizes)) for weight in layout.weights() if weight.name in names)


def count_bytes(layout: Layout, names: set[str], sizes: Mapping[str, int], bits: int, width: int) -> int:
    """Bytes of a Bridge that has the weights `names`: its blocks' matrices in so many bits, `width` bytes for the rest.

    64 neighbours of a row share a scale's byte (`tensors.packed`), its last ones are filled up; 16 bits mean `width` as
    well.
    """
    total = 0
    for weight in layout.weights():
        if weight.name in names:
            shape = shape_of(weight.pattern, sizes)
            if bits != 16 and weight.place.stack is not None and len(shape) == 2:
                rows, columns = shape
                total += rows * math.ceil(columns / 64) * (8 * bits + 1)
            else:
                total += math.prod(shape) * width
    return total


def budgeted_sizes(layout: Layout, names: set[str], budget: int, whole: Collection[Axis] = ()) -> dict[str, int]:
    """The widest axis sizes, all axes reduced alike that do not stay `whole`, whose parameters fit the budget.

    Raises ConfigError if even one unit per axis does not fit.
    """
    widest = max(layout.sizes[axis] for axis in layout.family.scope)
    reductions = sorted({layout.sizes[a] / k for a in layout.family.scope for k in _units(layout.sizes[a])})
    reductions.append(float(2 * widest))

    def count(reduction: float) -> int:
        return count_parameters(layout, names, reduced_sizes(layout, max(1.0, reduction), whole))

    first = bisect_left(reductions, True, key=lambda reduction: count(reduction) <= budget)  # no axis grows with it
    if first == len(reductions):
        smallest = count(reductions[-1])
        raise ConfigError(
            f"a budget of {budget} parameters is too small: the smallest Bridge of this model has {smallest}"
        )
    return reduced_sizes(layout, max(1.0, reductions[first]), whole)


def _units(size: int) -> list[float]:
    """Just past every rounding border of `round(size / r)`, widest first."""
    step = max(1, size // 512)
    return [units - 0.499 for units in range(size, 0, -step)] + [float(size)]
