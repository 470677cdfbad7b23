"""W_down: from the large model's axes to the Bridge's (Jin et al. 2023, section 2).

`select` takes the channels and heads the Bridge kept (or its projection of them). `learned` starts
there, as a matrix, and trains with the rest.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from plugbridge.families.spec import Layout, Place
from plugbridge.shrink.importance import scope_key
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tensors.axes import Op, Project, matrix_of, transform
from plugbridge.tensors.patterns import axis_names
from plugbridge.transfer.plug import known_sizes
from plugbridge.tuners.module import Module, pattern_of
from plugbridge.tuners.table import Method

DownKind = Literal["select", "learned"]
Down = dict[str, Tensor]


def start_down(kind: DownKind, layout: Layout, plan: BridgePlan, method: Method, module: Module) -> Down:
    """Matrices (bridge, large) by scope key, for the axes the module's tensors have; none for `select`."""
    if kind == "select":
        return {}
    down: Down = {}
    for slot in module:
        place = Place(slot.stack, slot.layer)
        for axis in axis_names(pattern_of(method, layout, slot)):
            key = scope_key(layout, axis, place)
            if key is not None and key not in down:
                down[key] = matrix_of(plan.op(key), layout.sizes[axis])
    return down


def apply_down(method: Method, layout: Layout, plan: BridgePlan, down: Mapping[str, Tensor], module: Module) -> Module:
    """View a module of large width at the Bridge's width. Differentiable."""
    viewed: Module = {}
    for slot, tensor in module.items():
        pattern = pattern_of(method, layout, slot)
        place = Place(slot.stack, slot.layer)
        ops: dict[str, Op] = {}
        for axis, kept in plan.ops(layout, pattern, place).items():
            key = scope_key(layout, axis, place)
            matrix = down.get(key) if key is not None else None
            ops[axis] = kept if matrix is None else Project(matrix)
        viewed[slot] = transform(tensor, pattern, ops, known_sizes(layout), slot.tensor)
    return viewed
