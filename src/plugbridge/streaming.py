"""The large model run from disk: the matrices of one block in place, those of the next one read ahead.

The model is transformers' own and keeps on the device whatever is outside of the blocks, and the blocks'
vectors (norms, biases: less than a thousandth of a block). The matrices of a block are put in place when one of its
sublayers is called, by the model itself or alone, and stay until another block's is. What is not in place is an
`Absent` parameter: of the right shape, dtype and device, with no memory behind it, NaN everywhere (of a packed matrix
its scales are), so that a result that missed a weight cannot go unseen.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.errors import ModelError
from plugbridge.families.spec import Layout, Place, layout_of_config
from plugbridge.models import layout_for, load_model
from plugbridge.parsing import shown
from plugbridge.tensors.checkpoint import DTYPES, Checkpoint

SCALE_NAN = 127
"""The byte that is NaN as a packed matrix's scale, a float8."""
Owners = list[tuple[nn.Module, str]]
"""Modules that hold one parameter, each with the attribute's name; several where weights are tied."""
ReaderOf = Callable[[list[str], nn.Parameter], Callable[[], Tensor]]
"""For a parameter's names and the parameter: what reads it in the model's dtype and on its device."""


class Absent(nn.Parameter):
    """A parameter that is on disk: `read` returns its tensor in the model's dtype and on its device."""

    read: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, device: str, read: Callable[[], Tensor]) -> "Absent":
        """A stand-in of `like`'s shape and dtype."""
        missed = torch.nan if like.is_floating_point() else SCALE_NAN
        nothing = torch.full((), missed, dtype=like.dtype, device=device).expand(like.shape)
        absent = Absent(nothing, requires_grad=False)
        absent.read = read
        return absent


class Window:
    """The blocks of a model, of which one is in place and one more is read ahead by `reader`, on a thread unless told.

    `reads` counts the blocks read, the one that is being read ahead included. Which block comes next is learned from
    which came after the same two before, so that a way back down, and generation that leaves the encoder out, are read
    ahead as well; until then it is the next one in the direction of the last step.
    """

    def __init__(self, blocks: list[list[tuple[Absent, Owners]]], reader: Executor | None = None) -> None:
        self.blocks = blocks
        self.reads = 0
        self.current: int | None = None
        self._before: int | None = None
        self._next: dict[tuple[int | None, int | None], int] = {}
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None
        self.reader = reader if reader is not None else ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def need(self, block: int) -> None:
        """Put a block's matrices in place. Raises ModelError as `Checkpoint.read` does."""
        if block == self.current:
            return
        before, current = self._before, self.current
        tensors = self._taken(block)
        self.release()
        for (_, owners), tensor in zip(self.blocks[block], tensors, strict=True):
            _place(owners, nn.Parameter(tensor, requires_grad=False))
        del tensors
        self._next[before, current] = block
        self._before, self.current = current, block
        step = -1 if self._before == block + 1 else 1
        following = self._next.get((self._before, block), (block + step) % len(self.blocks))
        if following != block:
            self.reads += 1
            self._ahead = (following, self.reader.submit(self._read, following))

    def release(self) -> None:
        """Take the block in place away."""
        for absent, owners in self.blocks[self.current] if self.current is not None else ():
            _place(owners, absent)
        self.current = None

    def _taken(self, block: int) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == block:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].exception()  # wait: the thread holds a block until it is done
            del ahead
        self.release()
        self.reads += 1
        return self._read(block)

    def _read(self, block: int) -> list[Tensor]:
        return [absent.read() for absent, _ in self.blocks[block]]


def _place(owners: Owners, parameter: nn.Parameter) -> None:
    for module, leaf in owners:
        setattr(module, leaf, parameter)


def values_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters, tied ones once, in the model's order; of those on disk one is read ahead."""
    window = window_of(model)
    parameters = list(model.named_parameters())
    ahead: Future[Tensor] | None = None
    for i, (name, parameter) in enumerate(parameters):
        read = _read_of(parameter)
        values = ahead.result() if ahead is not None else parameter.detach() if read is None else read()
        following = _read_of(parameters[i + 1][1]) if i + 1 < len(parameters) else None
        ahead = window.reader.submit(following) if window is not None and following is not None else None
        yield name, values
        del values  # or it stays until the next one is here


def _read_of(parameter: nn.Parameter) -> Callable[[], Tensor] | None:
    """What reads a parameter from disk; None if it is in memory. A fake stand-in is no `Absent`."""
    return getattr(parameter, "read", None)


def load_streamed(
    source: str,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    packed: bool = False,
) -> tuple[PreTrainedModel, Layout]:
    """A frozen model in evaluation mode whose blocks stay on disk, and its layout. A Bridge may be `packed`.

    Raises ModelError as `load_model` does, and for a tensor that is missing or of another shape.
    """
    model = _without_weights(source, checkpoint, dtype, trust_remote_code, packed)
    layout = layout_of_config(model.config.to_dict()) if packed else layout_for(model)
    stream_blocks(model, layout, device, partial(_reader, source, model, checkpoint, device))
    return model, layout


def load_converted(
    source: str,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A whole model in another precision than its files', read a tensor at a time; None where it is in theirs.

    transformers maps the files while it converts, so that a model would take their bytes and its own. It is also None
    where tensors have other names than the model's weights, which transformers may know. Raises ModelError as
    `load_model` and `Checkpoint.read` do.
    """
    stored = [DTYPES.get(entry.dtype) for entry in checkpoint.entries.values()]
    if None in stored or all(kind == dtype for kind in stored if kind is not None and kind.is_floating_point):
        return None
    model = _without_weights(source, checkpoint, dtype, trust_remote_code)
    weights = list(_distinct(model))
    if any(_stored(model, checkpoint, names) is None for names, _ in weights):
        return None
    fill_buffers(model, device)
    for names, parameter in weights:
        values = _reader(source, model, checkpoint, device, names, parameter)()
        _place(_owners(model, names), nn.Parameter(values, parameter.requires_grad))
    return model


def stream_blocks(
    model: PreTrainedModel, layout: Layout, device: str, reader_of: ReaderOf, reader: Executor | None = None
) -> None:
    """Put what is outside of the blocks of a model on `meta` in place, and the blocks when they are needed.

    `reader` runs what reads ahead.
    """
    fill_buffers(model, device)
    order = {place: i for i, place in enumerate(_blocks_of(layout))}
    blocks: list[list[tuple[Absent, Owners]]] = [[] for _ in order]
    for names, parameter in _distinct(model):
        read = reader_of(names, parameter)
        owners = _owners(model, names)
        place = layout.block_of(names[0])
        if place is None or (parameter.dim() < 2 and parameter.is_floating_point()):
            _place(owners, nn.Parameter(read(), requires_grad=False))
            continue
        absent = Absent.of(parameter, device, read)
        _place(owners, absent)
        blocks[order[place]].append((absent, owners))
    window = Window(blocks, reader)
    cast(Any, model).streaming_window = window
    for path, _ in layout.functions():
        model.get_submodule(path).register_forward_pre_hook(_opener(window_opener(model, path, layout)))
    model.requires_grad_(False).eval()


def window_of(model: nn.Module) -> Window | None:
    """The window of a streamed model; None if the whole model is in memory."""
    return getattr(model, "streaming_window", None)


def window_opener(model: nn.Module, path: str, layout: Layout) -> Callable[[], None] | None:
    """What puts the block that a module is in in place; None where the whole model is in memory."""
    window, place = window_of(model), layout.block_of(path)
    if window is None or place is None:
        return None
    return partial(window.need, _blocks_of(layout).index(place))


def block_bytes(model: nn.Module, layout: Layout) -> int:
    """What the matrices of a model's largest block take in memory."""
    table = layout.table()
    found: dict[Place, int] = {}
    for name, parameter in model.named_parameters():
        place = table[name].place
        if place.stack is not None and parameter.dim() >= 2:
            found[place] = found.get(place, 0) + parameter.nbytes
    return max(found.values())


def _opener(opens: Callable[[], None] | None) -> Callable[..., None]:
    assert opens is not None

    def hook(*_: Any) -> None:
        opens()

    return hook


def _blocks_of(layout: Layout) -> list[tuple[str, int]]:
    """Stack and layer of every block in the order in which they run."""
    return [(stack, layer) for stack in layout.family.stack for layer in range(layout.layers[stack])]


def _without_weights(
    source: str, checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, packed: bool = False
) -> PreTrainedModel:
    """A model on `meta`, its weights tied as transformers ties them, which compares those that the files hold twice."""
    model = load_model(source, dtype=dtype, device="meta", trust_remote_code=trust_remote_code, packed=packed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, other in ties.items():
        one, two = (_stored(model, checkpoint, [each]) for each in (name, other))
        if parameters[name] is parameters[other] or one is None or two is None:
            continue
        if torch.equal(checkpoint.read(one), checkpoint.read(two)):
            _place(_owners(model, [name]), parameters[other])
    return model


def _distinct(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all its names."""
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(name)
    yield from names.values()


def _owners(model: PreTrainedModel, names: list[str]) -> Owners:
    return [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]


def _stored(model: PreTrainedModel, checkpoint: Checkpoint, names: list[str]) -> str | None:
    """The name on disk of a parameter. A checkpoint of the model without its head lacks the names' first part."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (*names, *(n.removeprefix(prefix) for n in names)) if n in checkpoint.entries), None)


def _reader(
    source: str, model: PreTrainedModel, checkpoint: Checkpoint, device: str, names: list[str], like: Tensor
) -> Callable[[], Tensor]:
    """What reads one parameter from disk."""
    stored = _stored(model, checkpoint, names)
    if stored is None:
        raise ModelError(f"{source} lacks weight {shown(names[0])}; is the checkpoint complete?")
    entry, dtype = checkpoint.entries[stored], like.dtype
    if entry.shape != tuple(like.shape):
        raise ModelError(
            f"tensor {shown(stored)} in {entry.shard} has shape {entry.shape}, config.json says {tuple(like.shape)}"
        )
    return lambda: checkpoint.read(stored, dtype).to(device)


def fill_buffers(model: PreTrainedModel, device: str) -> None:
    """Compute the buffers that no checkpoint holds (Llama's rotary frequencies), by transformers' own code."""
    for module in model.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in own.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if own:
            cast(Any, model)._init_weights(module)
