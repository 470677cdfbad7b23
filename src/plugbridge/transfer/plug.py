"""Plug and layer map: carrying a module from small width to large width.

W_plug of Jin et al. 2023 (section 2): one linear map per module group, shared by all layers. A
group is a tensor of the method at one kind of site; where several vectors of one width are stacked
(GPT-2's query, key and value; a prefix's key and value) each has a map of its own.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from plugbridge.families.spec import Layout
from plugbridge.tensors.axes import Project, transform
from plugbridge.tensors.patterns import parse
from plugbridge.tuners.module import Module, Slot, pattern_of
from plugbridge.tuners.table import Method

LayerMap = dict[str, list[int]]
Plug = dict[str, Tensor]


def uniform_layer_map(small: Layout, large: Layout) -> LayerMap:
    """For each large layer the small layer it copies: layers are duplicated evenly, in order."""
    return {
        stack: [layer * small.layers[stack] // count for layer in range(count)] for stack, count in large.layers.items()
    }


def duplicate(module: Module, layers: LayerMap) -> Module:
    """Copy a small module's tensors to every large layer that maps to its layer."""
    copies: Module = {}
    for slot, tensor in module.items():
        for layer, source in enumerate(layers[slot.stack]):
            if source == slot.layer:
                copies[Slot(slot.stack, layer, slot.site, slot.tensor)] = tensor.clone()
    return copies


def plug_key(slot: Slot) -> str:
    """The plug group of a slot: a weight and its bias share one."""
    return f"{slot.stack}:{slot.site}:{slot.tensor.partition('.')[0]}"


def model_dim(layout: Layout, pattern: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The one dimension of a module tensor that has the model's width.

    Returns (stacked axes, width axes), the first fixed in number (``qkv``, ``kv``), the second
    mapped by the plug; None for a tensor without such a dimension (an adapter's inner bias).
    """
    fixed = {*layout.family.fixed, "kv"}
    for dim in parse(pattern):
        if any(name in layout.sizes and name not in fixed for name in dim):
            split = next(i for i, name in enumerate(dim) if name not in fixed)
            return dim[:split], dim[split:]
    return None


def known_sizes(layout: Layout) -> dict[str, int]:
    """Axis sizes that the axes of module tensors may name."""
    return {**layout.sizes, "kv": 2}


def plug_shapes(method: Method, small: Layout, large: Layout, module: Module) -> dict[str, tuple[int, int, int]]:
    """Shapes of all plug maps for a module: (stacked, large width, small width) by group."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for slot in module:
        dim = model_dim(large, pattern_of(method, large, slot))
        if dim is not None:
            stacked, width = dim
            a, b = known_sizes(small), known_sizes(large)
            shapes[plug_key(slot)] = (
                math.prod(a[name] for name in stacked),
                math.prod(b[name] for name in width),
                math.prod(a[name] for name in width),
            )
    return shapes


def random_plug(shapes: Mapping[str, tuple[int, int, int]], generator: torch.Generator) -> Plug:
    """Random maps with orthonormal columns (rows, where the large width is the smaller one)."""
    plug: Plug = {}
    for key, (stacked, large, small) in shapes.items():
        wide = torch.randn(stacked, max(large, small), min(large, small), generator=generator)
        basis = torch.linalg.qr(wide).Q
        plug[key] = (basis if large >= small else basis.mT).contiguous()
    return plug


def apply_plug(method: Method, small: Layout, large: Layout, plug: Mapping[str, Tensor], module: Module) -> Module:
    """Carry a module, already duplicated to the large model's layers, to large width.

    A tensor without a map in the plug is at large width already (a fresh module). Differentiable in
    the plug and in the module.
    """
    carried: Module = {}
    matrices: dict[str, Tensor] = {}  # one for all layers: autograd keeps each until the backward pass
    for slot, tensor in module.items():
        pattern = pattern_of(method, large, slot)
        dim = model_dim(large, pattern)
        key = plug_key(slot)
        if dim is None or key not in plug:
            carried[slot] = tensor
            continue
        stacked, width = dim
        if key not in matrices:
            matrices[key] = torch.block_diag(*plug[key]) if stacked else plug[key][0]
        op = {" ".join((*stacked, *width)): Project(matrices[key])}
        carried[slot] = transform(tensor, pattern, op, known_sizes(small), slot.tensor)
    return carried
