"""Exact gradients through the large model itself, block by block: backpropagation in the memory of a block.

Forward, no graph is kept, only what every block was given (activation checkpointing, Chen et al. 2016). Backward, from
the top, each block is run again with a graph. Of a streamed model a block's matrices are read for it and dropped after
it, twice a step: all parts of a step (`micro_batch`) pass one block before the next is read. Layers below the first
that trains are run forward only. With 4-bit weights this is QLoRA (Dettmers et al. 2023).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from plugbridge.evaluate import mean_loss
from plugbridge.families.spec import Layout
from plugbridge.models import drops_out, fuse_gelu
from plugbridge.shrink.backward import Row, enter, frame_of, send_back
from plugbridge.shrink.sweep import Block, Run, Slots, blocks_of, put_in_place, run_block, sweep_keeping
from plugbridge.tasks.encode import Batch, Encoded, Encoder, gold
from plugbridge.train import shares
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.prefix_cache import layer_prefix
from plugbridge.tuners.module import Module, Slot, attach, pack, parameter_name
from plugbridge.tuners.table import Method

Own = dict[int, dict[Slot, Tensor]]
"""A module's tensors in every block, by the block's number."""


def backprop(coupling: Coupling) -> Loss:
    """The loss of the plugged large model with its exact gradient."""
    large = coupling.large_model
    assert large is not None
    wrapped, _ = attach(large, coupling.method, coupling.large, coupling.settings)
    wrapped.train()
    return coupled_exactly(coupling, wrapped)


def coupled_exactly(coupling: Coupling, wrapped: PeftModel) -> Loss:
    """`exact_loss` of a coupling's large model, which carries its module."""
    return exact_loss(
        wrapped, coupling.method, coupling.large, coupling.encoder, coupling.at_large_width, coupling.trains,
        coupling.micro_batch,
    )  # fmt: skip


def exact_loss(
    wrapped: PeftModel,
    method: Method,
    layout: Layout,
    encoder: Encoder,
    module: Callable[[], Module],
    trains: Callable[[Slot], bool] = lambda _slot: True,
    micro_batch: int | None = None,
) -> Loss:
    """The loss of a model that carries a module, trained block by block: `module` gives its tensors for every step.

    Dropout acts where the model is in training mode. A step's rows go through a block in parts of `micro_batch` rows.
    """
    model = cast(PreTrainedModel, wrapped.get_base_model())
    fuse_gelu(model)
    blocks = blocks_of(model, layout)
    number = {(block.stack, layer): block.number for layer, block in _with_layers(blocks)}
    drops = drops_out(model.config) or any(isinstance(part, nn.Dropout) and part.p > 0 for part in wrapped.modules())
    forward = wrapped if method.stacked else partial(wrapped, use_cache=False)

    def placed(wide: Module) -> Own:
        """Put a module on the model; its tensors are leaves there."""
        local = {slot: tensor.detach().requires_grad_(trains(slot)) for slot, tensor in wide.items()}
        if method.stacked:
            for key, tensor in pack(method, layout, local).items():
                wrapped.get_parameter(parameter_name(key)).data = tensor.detach()
        else:
            parameters = _parameters(wrapped, method, layout, wide)
            for slot, parameter in parameters.items():
                parameter.data = local[slot].detach()
                parameter.requires_grad_(trains(slot))
            local = parameters
        own: Own = {block.number: {} for block in blocks}
        for slot, tensor in local.items():
            own[number[slot.stack, slot.layer]][slot] = tensor
        return own

    def loss(rows: list[Encoded]) -> Tensor:
        wide = module()
        own = placed(wide)
        parts: list[tuple[Callable[[], Tensor], Run]] = []
        for part, share in shares(rows, micro_batch, lambda row: row.weight):
            numbers = _drawn_from(_new_seed() if drops and wrapped.training else None, model.device)
            batch = gold(encoder, part).to(model.device)
            prefixed = _prefixed(layout, encoder, own) if method.stacked else run_block
            parts.append((
                partial(_part_loss, forward, batch, encoder.kind, share, numbers), partial(_run, prefixed, numbers)
            ))  # fmt: skip
        calls, runs = [call for call, _ in parts], [run for _, run in parts]
        passages = sweep_keeping(model, blocks, calls, None, _in_place, runs)
        passing = [Row(*each) for each in zip(calls, passages, runs, strict=True)]
        value, gradients = _send_all_back(model, layout, blocks, passing, own)
        found = [(gradient.to(wide[slot].dtype) * wide[slot]).sum() for slot, gradient in gradients.items()]
        surrogate = torch.stack(found).sum()
        return value + (surrogate - surrogate.detach())  # zero first: the loss stays exact

    return loss


def _send_all_back(
    model: PreTrainedModel,
    layout: Layout,
    blocks: Sequence[Block],
    rows: Sequence[Row],
    own: Own,
) -> tuple[Tensor, Module]:
    """The loss of all rows, and the gradients of what trains."""
    values: list[Tensor] = []
    gradients: Module = {}
    for stack in reversed(layout.family.stack):
        passed = [block for block in reversed(blocks) if block.stack == stack and rows[0].passage.reaches(block)]
        if not passed:
            continue
        for row in rows:
            frame = frame_of(blocks, row)
            enter(stack, frame, row.ledger)
            values.append(frame.value.detach())
            del frame
        for block in passed:
            put_in_place(model, block)
            mine = {slot: tensor for slot, tensor in own[block.number].items() if tensor.requires_grad}
            for row in rows:
                found = send_back(block, row, list(mine.values()))
                for slot, gradient in zip(mine, found, strict=True):
                    gradients[slot] = gradients[slot] + gradient if slot in gradients else gradient
    return torch.stack(values[: len(rows)]).sum(), gradients


def _part_loss(
    forward: Callable[..., Any],
    batch: Batch,
    kind: str,
    share: float,
    numbers: Callable[[int], AbstractContextManager[None]],
) -> Tensor:
    with numbers(0):
        return mean_loss(forward, batch, kind) * share


def _run(run: Run, numbers: Callable[[int], AbstractContextManager[None]], block: Block, slots: Slots) -> Any:
    with numbers(1 + block.number):
        return run(block, slots)


def _prefixed(layout: Layout, encoder: Encoder, own: Own) -> Run:
    """Runs blocks with their own prefix in the place of the cache that the model hands down."""
    places: dict[int, int | str] = {}
    seq2seq = encoder.kind == "seq2seq"

    def run(block: Block, slots: Slots) -> Any:
        place = next((key for key, value in slots.items() if isinstance(value, Cache)), places.get(block.number))
        if place is None or not own[block.number]:
            return run_block(block, slots)
        places[block.number] = place  # on the way back there is no cache
        ((slot, prefix),) = own[block.number].items()
        x = cast(Tensor, slots[0] if 0 in slots else slots["hidden_states"])
        return run_block(block, {**slots, place: layer_prefix(layout, seq2seq, prefix, slot.layer, x)})

    return run


def _in_place(model: nn.Module, block: Block) -> AbstractContextManager[None]:
    put_in_place(model, block)
    return nullcontext()


def _with_layers(blocks: Sequence[Block]) -> Generator[tuple[int, Block]]:
    """Every block with its number among those of its stack."""
    count: dict[str, int] = {}
    for block in blocks:
        layer = count.get(block.stack, 0)
        count[block.stack] = layer + 1
        yield layer, block


def _parameters(wrapped: PeftModel, method: Method, layout: Layout, module: Module) -> dict[Slot, nn.Parameter]:
    """The model's own parameters for the slots of a module; none where all layers share one."""
    if method.stacked:
        return {}
    keys = zip(module, pack(method, layout, module), strict=True)
    return {slot: wrapped.get_parameter(parameter_name(key)) for slot, key in keys}


def _new_seed() -> int:
    return int(torch.randint(2**48, ()))


def _drawn_from(seed: int | None, device: torch.device) -> Callable[[int], AbstractContextManager[None]]:
    """For a place of a step, what has it draw the same numbers every time; nothing where no number is dropped."""

    @contextmanager
    def numbers(place: int) -> Generator[None]:
        if seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + place)
            yield

    return numbers
