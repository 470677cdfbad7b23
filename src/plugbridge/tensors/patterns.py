"""Patterns of named axes: what a tensor's dimensions are called, and how long they are. Knows no tensor.

A pattern such as ``"hidden (qkv heads head_dim)"`` names the axes of a tensor; parentheses
join several axes into one dimension, the last varying fastest (as in einops).
"""

import math
from collections.abc import Mapping
from functools import cache

from plugbridge.errors import ShapeError

Dims = tuple[tuple[str, ...], ...]


@cache
def parse(pattern: str) -> Dims:
    """Split a pattern into dimensions, each a tuple of axis names.

    >>> parse("hidden (qkv heads head_dim)")
    (('hidden',), ('qkv', 'heads', 'head_dim'))
    """
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for word in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" and group is None:
            group = []
        elif word == ")" and group:
            dims.append(tuple(group))
            group = None
        elif word in "()":
            raise ShapeError(f"pattern '{pattern}' has unbalanced or empty parentheses")
        elif group is None:
            dims.append((word,))
        else:
            group.append(word)
    if group is not None:
        raise ShapeError(f"pattern '{pattern}' has unbalanced parentheses")
    names = [name for dim in dims for name in dim]
    if len(set(names)) != len(names):
        raise ShapeError(f"pattern '{pattern}' names an axis twice")
    return tuple(dims)


def axis_names(pattern: str) -> tuple[str, ...]:
    """All axis names of a pattern, in order of variation (slowest first)."""
    return tuple(name for dim in parse(pattern) for name in dim)


def shape_of(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape that a tensor with this pattern has. Raises KeyError for an unknown axis."""
    return tuple(math.prod(sizes[name] for name in dim) for dim in parse(pattern))


def infer_sizes(pattern: str, shape: tuple[int, ...], known: Mapping[str, int], what: str = "tensor") -> dict[str, int]:
    """Sizes of all axes of a tensor, from its shape and the sizes already known.

    One axis of each dimension may be unknown. Raises ShapeError where the shape does not fit.
    """
    dims = parse(pattern)
    if len(dims) != len(shape):
        raise ShapeError(f"{what} has {len(shape)} dimensions but its axes are '{pattern}'")
    sizes: dict[str, int] = {}
    for dim, length in zip(dims, shape, strict=True):
        unknown = [name for name in dim if name not in known]
        product = math.prod(known[name] for name in dim if name in known)
        if len(unknown) > 1:
            raise ShapeError(f"{what}: sizes of axes {unknown} of '{pattern}' are not known")
        if unknown:
            if product == 0 or length % product:
                raise ShapeError(f"{what}: a dimension of {length} is not divisible by {product} ('{pattern}')")
            sizes[unknown[0]] = length // product
        elif product != length:
            raise ShapeError(f"{what} has a dimension of {length}, but its axes ({' '.join(dim)}) give {product}")
        sizes.update({name: known[name] for name in dim if name in known})
    return sizes
