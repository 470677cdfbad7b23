"""What operations on fake tensors give, remembered by what they were given.

Of a fake tensor an operation knows shape, layout, precision and device, and a trace does the same few operations
thousands of times. torch remembers them, too, but spends five times as long on looking an answer up: it allows for
symbolic sizes and sparse tensors, which there are none of here.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_C: Any = cast(Any, torch)._C
aten = torch.ops.aten
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that are no tensors, by value."""
REPLACED = (aten.set_, aten.resize_)
"""Operations that put another storage in the place of a tensor's own."""


@dataclass(frozen=True)
class Effect:
    """What an operation costs, as `Alive` counts it: work of one kind, none where it only looks at a tensor."""

    number: torch.dtype
    flops: int | None = None
    moved: int | None = None
    scratch: int = 0
    primitive: Any = None


@dataclass(frozen=True)
class _Made:
    """A tensor that an operation makes: of an argument's storage if it is a `view` of one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    view: int | None = None
    offset: int = 0

    def again(self, world: FakeTensorMode, args: tuple[Any, ...]) -> Tensor:
        with _C.DisableTorchFunction(), _C._DisableTorchDispatch():
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.view is not None:
                made.set_(args[self.view].untyped_storage(), self.offset, self.shape, self.stride)
            return FakeTensor(world, made, self.device)


@dataclass(frozen=True)
class Answer:
    """What an operation gives, with its effect: tensors that it makes, or the argument of a place."""

    effect: Effect
    parts: tuple[_Made | int | None, ...]
    container: type | None

    def again(self, world: FakeTensorMode, args: tuple[Any, ...]) -> Any:
        """The operation's result for other arguments of the same shapes."""
        found = [part.again(world, args) if isinstance(part, _Made) else None if part is None else args[part]
                 for part in self.parts]  # fmt: skip
        return found[0] if self.container is None else self.container(found)


class Unknown(Exception):
    """Something else than its arguments' shapes decides what an operation gives."""


def key_of(world: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All that the result of an operation depends on, or None where it is not to be remembered."""
    if func.namespace != "aten" or func._overloadpacket in REPLACED or torch.is_inference_mode_enabled():
        return None
    try:
        names = tuple((name, _known(world, value)) for name, value in kwargs.items())
        return func, torch.get_default_dtype(), _known(world, args), names
    except Unknown:
        return None


def _known(world: FakeTensorMode, value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.fake_mode is not world:
            raise Unknown
        return value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset()
    if kind in (tuple, list, torch.Size):
        return tuple([_known(world, part) for part in value])
    if kind in PLAIN:
        return kind, value  # 1, 1.0 and True are one key of a dictionary
    raise Unknown


def answer_of(world: FakeTensorMode, func: Any, args: tuple[Any, ...], found: Any, effect: Effect) -> Answer | None:
    """What is to be remembered of an operation that gave `found`, if that can be: made again it must be the same."""
    container = type(found) if isinstance(found, tuple | list) else None
    if container not in (None, tuple, list):
        return None
    results = cast(tuple[Any, ...], found if container is not None else (found,))
    parts = tuple(_part(func, args, result) for result in results)
    storages = [id(result.untyped_storage()) for result, part in zip(results, parts, strict=True)
                if isinstance(part, _Made) and part.view is None]  # fmt: skip
    if Unknown in parts or len(set(storages)) < len(storages):
        return None
    answer = Answer(effect, cast(tuple[_Made | int | None, ...], parts), container)
    again = answer.again(world, args)
    pairs = zip(results, again if container is not None else (again,), strict=True)
    return answer if all(_alike(one, other) for one, other in pairs) else None


def _part(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    if result is None:
        return None
    if type(result) is not FakeTensor or result.constant is not None:
        return Unknown
    places = [i for i, arg in enumerate(args) if arg is result]
    if places:
        return places[0]
    made = _Made(result.shape, result.stride(), result.dtype, result.fake_device)
    storage = id(result.untyped_storage())
    shared = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and id(arg.untyped_storage()) == storage]
    if shared and func.is_view:
        return _Made(made.shape, made.stride, made.dtype, made.device, shared[0], int(result.storage_offset()))
    return Unknown if shared or func.is_view else made


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    sizes = [(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes(),
              _C._dispatch_key_set(tensor)) for tensor in (one, other)]  # fmt: skip
    return sizes[0][:-1] == sizes[1][:-1] and sizes[0][-1] == sizes[1][-1]
