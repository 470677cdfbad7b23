"""The vectors that every matrix of the blocks is multiplied by: what it reads going forward, or the errors going back.

Of every row those of the largest norm are kept, so that a matrix can be rounded for them (`rounding`). They are on disk
block by block: with a model that is streamed no more than a block's are ever in memory.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plugbridge.config.stages import Passing
from plugbridge.families.spec import Layout
from plugbridge.shrink.packing import matrices_of
from plugbridge.shrink.prune import BridgePlan
from plugbridge.tensors.axes import transform
from plugbridge.tensors.patterns import shape_of

KEPT = 256
"""Vectors of a matrix that are kept of all rows together, where there are not more rows: one of each at least."""


def vector_bytes(layout: Layout, kind: Passing | None, rows: int) -> int:
    """Bytes on disk of a model's vectors of a kind, at most, recorded on so many rows; none of no kind."""
    if kind is None:
        return 0
    side = layout.family.linear.split().index("out" if kind == "errors" else "in")
    shapes = [shape_of(weight.pattern, layout.sizes) for weight in layout.weights() if weight.place.stack is not None]
    return 2 * max(KEPT, rows) * sum(shape[side] for shape in shapes if len(shape) == 2)


class Vectors:
    """Vectors by the path of their layer, of each row the largest; written to a folder, one file for a block."""

    def __init__(self, folder: Path, kind: Passing, layout: Layout, rows: int) -> None:
        self.folder, self.kind, self.layout = folder, kind, layout
        self.of_a_row = max(1, KEPT // rows)
        self.found: dict[str, list[Tensor]] = {}

    def add(self, path: str, x: Tensor) -> None:
        """x: (…, width), of one row."""
        flat = x.detach().reshape(-1, x.shape[-1])
        largest = flat.float().square().sum(-1).topk(min(self.of_a_row, len(flat))).indices
        self.found.setdefault(path, []).append(flat[largest].to("cpu", torch.bfloat16))

    def finish(self, path: str) -> None:
        """Nothing more will come from the layers of a block: its vectors go to disk."""
        names = [name for name in self.found if name.startswith(f"{path}.")]
        if names:
            self.folder.mkdir(exist_ok=True)
            tensors = {name: torch.cat(self.found.pop(name)).contiguous() for name in names}
            save_file(tensors, str(self.folder / f"{path}.safetensors"))

    def close(self) -> None:
        """Write what is left."""
        for stack_name, stack in self.layout.family.stack.items():
            for layer in range(self.layout.layers[stack_name]):
                self.finish(stack.path.format(layer))


@contextmanager
def record_vectors(model: nn.Module, vectors: Vectors | None, kind: Passing) -> Generator[None]:
    """Record what the blocks' matrices read, or, where gradients flow, the errors at what they give.

    Nothing, where no vectors are wanted, or those of another kind.
    """
    if vectors is None or vectors.kind != kind:
        yield
        return

    def hook(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if kind == "inputs":
                vectors.add(path, inputs[0])
            elif output.requires_grad:
                output.register_hook(partial(vectors.add, path))

        return record

    with ExitStack() as hooks:
        for path in matrices_of(model, vectors.layout):
            hooks.callback(model.get_submodule(path).register_forward_hook(hook(path)).remove)
        yield
    vectors.close()


def read_vectors(folder: Path, kind: Passing, layout: Layout, plan: BridgePlan, path: str) -> Tensor | None:
    """Vectors (n, width) of a layer as the Bridge has them; None where none came by."""
    place, _ = layout.place_of(path)
    assert place.stack is not None
    file = folder / f"{layout.family.stack[place.stack].path.format(place.layer)}.safetensors"
    found = load_file(str(file)).get(path) if file.is_file() else None
    if found is None:
        return None
    axes = layout.linear_axes(path)[kind == "errors"]
    return transform(found.float(), f"vectors {axes}", plan.ops(layout, axes, place), layout.sizes)
