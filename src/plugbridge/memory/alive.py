"""Counting the tensors that are alive, operation by operation, with real tensors or with fake ones.

A fake tensor (torch's FakeTensorMode) has shape, dtype and device but no data, so that code made for real
models runs unchanged and costs no memory. What cannot be known without data is answered here: every
number asked for is one, tensors of one shape are equal, and a mask chooses as many positions as the caller says; of two
dimensions, all.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from plugbridge.memory.remembered import Answer, Effect, answer_of, key_of

aten = torch.ops.aten
_TABLES = (aten.embedding, aten.embedding_dense_backward, aten.index_select, aten.index)
HALVES = (torch.bfloat16, torch.float16)
_CURRENT: ContextVar["Alive | None"] = ContextVar("_CURRENT", default=None)
_WORLD: ContextVar[FakeTensorMode | None] = ContextVar("_WORLD", default=None)
_ANSWERS: dict[Any, Answer] = {}
"""What operations on fake tensors gave, of all traces: it depends on nothing but their keys."""


class Alive(TorchDispatchMode):
    """Bytes of all tensors made while the mode is on and not freed since, and work done.

    `now` are the bytes alive, `peaks` the most of them at each `place`, a name that the caller moves as the work
    goes on, with what decompositions take while they last. `flops` counts multiplications and additions of matrix
    products, `moved` the bytes that all other operations read and write, both by the precision of what comes out.
    `read` is what was noted as read from disk, in bytes, `primitives` the half-precision products of other shapes or
    layouts, `used` the bytes of the tensors in `weights` (storages that stay) that operations read, as often as they
    do; of a table only rows are read, which do not count. A storage shared by several tensors counts once. `chosen` is
    the number of positions that a mask of fake values chooses, `columns` that of a mask of one dimension; None for all.
    """

    def __init__(self, chosen: int | None = None) -> None:
        super().__init__()
        self.chosen = chosen
        self.columns: int | None = None
        self.now = 0
        self.flops: Counter[torch.dtype] = Counter()
        self.moved: Counter[torch.dtype] = Counter()
        self.read = 0
        self.used = 0
        self.weights: set[int] = set()
        self.primitives: set[Any] = set()
        self.peaks: dict[str, int] = {}
        self.place = ""
        self.known: set[int] = set()

    def __enter__(self) -> "Alive":
        self._outer = _CURRENT.set(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self._outer)
        super().__exit__(*error)

    def go_to(self, place: str) -> None:
        """Count at another place from now on."""
        self.place = place
        self.peaks[place] = max(self.peaks.get(place, 0), self.now)

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all questions
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        if func is aten.equal.default and isinstance(args[0], FakeTensor):
            return args[0].shape == args[1].shape
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor) and args[0].dim() == 1:
            return args[0].new_zeros(_all_or(self.columns, args[0]), 1, dtype=torch.long)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func is aten.uniform_.default and isinstance(args[0], FakeTensor):
            return args[0]  # first values of weights, which do not matter
        if func is aten._unsafe_view.default:
            func = aten.view.default  # the same tensor, and an answer that fake tensors remember
        if func is aten.index.Tensor:
            args = (args[0], _positions(args[1], self.chosen))
        if func.namespace == "prim":  # questions about a tensor, of which fake ones get many
            return func(*args, **(kwargs or {}))
        found, effect = _done(func, args, kwargs or {})
        for tensor in _tensors(found):
            self._add(tensor)
        self._work(effect)
        if self.weights and not func.is_view and func._overloadpacket not in _TABLES:
            self.used += sum(
                tensor.numel() * tensor.itemsize
                for tensor in _tensors(args)
                if id(tensor.untyped_storage()) in self.weights
            )
        return found

    def _add(self, tensor: Tensor) -> None:
        device: torch.device = getattr(tensor, "fake_device", None) or tensor.device
        if device.type == "meta":  # which has no bytes
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peaks[self.place] = max(self.peaks.get(self.place, 0), self.now)
            weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.weights.discard(key)
        self.now -= size

    def _work(self, effect: Effect) -> None:
        if effect.scratch:
            self.peaks[self.place] = max(self.peaks.get(self.place, 0), self.now + effect.scratch)
        if effect.flops is not None:
            self.flops[effect.number] += effect.flops
        if effect.moved is not None:
            self.moved[effect.number] += effect.moved
        if effect.primitive is not None:
            self.primitives.add(effect.primitive)


def _done(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Effect]:
    """What an operation gives and costs; it is done if the same was not before."""
    world = _WORLD.get()
    key = None if world is None else key_of(world, func, args, kwargs)
    known = None if key is None else _ANSWERS.get(key)
    if world is not None and known is not None:
        return known.again(world, args), known.effect
    found = func(*args, **kwargs)
    effect = _effect(func, args, kwargs, found)
    if world is not None and key is not None and key_of(world, func, args, kwargs) == key:  # or it changed a shape
        answer = answer_of(world, func, args, found, effect)
        if answer is not None:
            _ANSWERS[key] = answer
    return found, effect


def _effect(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Effect:
    packet, made = func._overloadpacket, _tensors(found)
    number = _number(made)
    scratch = _SCRATCH[packet](*args) if packet in _SCRATCH else 0
    counter = flop_registry.get(packet, _FLOPS.get(packet))
    if counter is not None:
        flops = int(counter(*args, **kwargs, out_val=found))
        shapes = (packet, *((tensor.shape, tensor.stride()) for tensor in _tensors(args)))
        return Effect(number, flops=flops, scratch=scratch, primitive=shapes if number in HALVES else None)
    if func.is_view:
        return Effect(number, scratch=scratch)
    read = _tensors(args) + _tensors(tuple(kwargs.values()))
    return Effect(number, moved=sum(tensor.numel() * tensor.itemsize for tensor in (*read, *made)), scratch=scratch)


def note_read(tensor: Tensor) -> Tensor:
    """A tensor that stands for one read from disk; the count that is on takes it in."""
    count = _CURRENT.get()
    if count is not None:
        count.read += tensor.numel() * tensor.itemsize
    return tensor


def note_used(*weights: Tensor) -> None:
    """Weights that an operation stands for reads; the count that is on takes them in."""
    count = _CURRENT.get()
    if count is not None:
        count.used += sum(tensor.numel() * tensor.itemsize for tensor in weights)


def _number(made: list[Tensor]) -> torch.dtype:
    """The precision of an operation's results: one of half the bytes, or float32, as which all others count."""
    return made[0].dtype if made and made[0].dtype in HALVES else torch.float32


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists; much faster than torch's own walk over trees."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in cast(list[Any], value) for tensor in _tensors(part)]
    return []


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _all_or(count: int | None, mask: Tensor) -> int:
    return mask.numel() if count is None else count


def _positions(indices: list[Tensor | None], chosen: int | None) -> list[Tensor | None]:
    """Indices without masks of fake values: each as so many positions along its dimensions."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, FakeTensor) and index.dtype == torch.bool:
            count = _all_or(chosen, index)
            found.extend(index.new_zeros(count, dtype=torch.long) for _ in range(index.dim()))
        else:
            found.append(index)
    return found


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Two matrix products of query and key size. query: (…, queries, width), key: (…, keys, width)."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward(_grad: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Five such products: the scores anew, and the gradients of them, query, key and value."""
    return 10 * query.numel() * key.shape[-2]


_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: flop_registry[aten.addmm],
}
"""What torch's own table leaves out: attention's CPU kernel, and a product that is added in place."""


def _eigenvectors_scratch(matrix: Tensor, *_: Any, **__: Any) -> int:
    """LAPACK's syevd works on 2 n^2 numbers beside the vectors. matrix: (n, n)."""
    return 2 * matrix.nbytes


def _singular_scratch(matrix: Tensor, *_: Any, **__: Any) -> int:
    """LAPACK's gesdd works on a copy and on 3 k^2 numbers, k the smaller dimension. matrix: (m, n)."""
    return matrix.nbytes + 3 * min(matrix.shape) ** 2 * matrix.itemsize


_SCRATCH: dict[Any, Callable[..., int]] = {
    aten._linalg_eigh: _eigenvectors_scratch,
    aten._linalg_svd: _singular_scratch,
}
"""Bytes that operations take while they last, which are no tensors."""


class _World(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> "_World":
        return self  # a copied fake tensor is of the same world


@contextmanager
def fake_tensors() -> Generator[None]:
    """Every tensor made in the block is fake."""
    base = cast(Any, nn.Module)
    own = base._apply
    # torch's swaps fake parameters for their converted selves, which it refuses where something refers to them weakly
    base._apply = _convert
    world = _World()
    outer = _WORLD.set(world)
    try:
        with world:
            yield
    finally:
        _WORLD.reset(outer)
        base._apply = own


def _convert(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Put converted parameters and buffers in the place of a module's own; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module in self.modules() if recurse else (self,):
        parameters: dict[str, nn.Parameter | None] = cast(Any, module)._parameters
        buffers: dict[str, Tensor | None] = cast(Any, module)._buffers
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                changed = fn(parameter)
            if changed is not parameter:
                made = done.setdefault(id(parameter), nn.Parameter(changed, parameter.requires_grad))
                parameters[name] = made
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = fn(buffer)
    return self


@contextmanager
def marked(alive: Alive, model: nn.Module, paths: dict[str, str]) -> Generator[None]:
    """Move the count to a named place whenever one of a model's modules is entered, forward or backward.

    `paths` maps module paths to names; what is before the first colon of the present place stays.
    """

    def move(name: str) -> None:
        alive.go_to(f"{alive.place.partition(':')[0]}:{name}")

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
            move(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            written = output[0] if isinstance(output, tuple) else output
            if isinstance(written, Tensor) and written.requires_grad:
                written.register_hook(back)

        def back(_gradient: Tensor) -> None:
            move(f"{name}, backward")

        return hook

    with ExitStack() as hooks:
        for path, name in paths.items():
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(before(name)).remove)
            hooks.callback(module.register_forward_hook(after(name)).remove)
        yield
