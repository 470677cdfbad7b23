"""The one training loop: an optimizer over named tensors, exact resume from step checkpoints.

Every step's data and randomness follow from (seed, step) alone, so a run that was killed and
resumed does the same steps as one that was not.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from plugbridge.config.stages import OptimizerName
from plugbridge.cost import Cost, trim
from plugbridge.errors import ModelError, TrainingDiverged
from plugbridge.files import write_atomically
from plugbridge.interrupts import Interrupts, listening
from plugbridge.progress import Progress, trend

log = logging.getLogger(__name__)
T = TypeVar("T")
STRIDE = 1_000_003
"""Seeds of steps that a training's seed sets aside."""


@dataclass(frozen=True)
class Schedule:
    """Numbers of one training. `learning_rates` maps a name prefix to a rate, ``""`` to the default.

    A step's rows go through the models `micro_batch` at a time, all at once where it is None.
    """

    steps: int
    batch_size: int
    learning_rates: Mapping[str, float]
    warmup: float
    weight_decay: float
    clip: float
    checkpoint_every: int
    seed: int
    micro_batch: int | None = None
    optimizer: OptimizerName = "adamw"


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of groups of tensors, each with its rate ``lr``.

    Adafactor (Shazeer & Stern 2018) keeps a row and a column of second moments for every matrix, and no first ones.
    Updates are clipped at a root mean square of 1 and not scaled by the tensor's own: a rate means what AdamW's does.
    """
    if name == "adafactor":
        return Adafactor(groups, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=True)


def rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warmup over a share of the steps, then cosine decay to zero. step counts from 0."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, schedule.steps - warm)))


def batch_indices(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Rows of one step: every epoch is a fresh permutation, epochs follow without a gap."""
    found: list[int] = []
    position = step * batch_size
    while len(found) < batch_size:
        epoch, offset = divmod(position + len(found), count)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        found.extend(int(i) for i in order[offset : offset + batch_size - len(found)])
    return found


def drawn(rows: Sequence[T], count: int | None, seed: int) -> list[T]:
    """So many of the rows, or all where there are no more or `count` is None: their order follows from the seed alone.

    The first rows of a file may all be of one class.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[int(i)] for i in order[:count]]


def rate_of(name: str, rates: Mapping[str, float]) -> float:
    """The learning rate of the longest prefix that the name has."""
    return rates[max((p for p in rates if name.startswith(p)), key=len)]


def fit(
    parameters: Mapping[str, Tensor],
    rows: Sequence[T],
    loss_of: Callable[[list[T]], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    progress: Progress,
    title: str,
    weight_of: Callable[[T], int] = lambda _row: 1,
    cost: Cost | None = None,
) -> list[float]:
    """Train named tensors in place; returns the loss of every step. No gradient stays.

    The loss of rows is the mean over what `weight_of` counts in them: a step in parts weighs them by it.
    Resumes from `checkpoint` when it is there, and leaves it, of the last step, to the caller to remove. What it `cost`
    until then goes with it.
    Raises TrainingDiverged at the first loss or gradient that is not finite, by which nothing is updated, and where
    the tensors are not finite at the end.
    """
    groups = [{"params": [tensor], "lr": rate_of(name, schedule.learning_rates)} for name, tensor in parameters.items()]
    base = [float(group["lr"]) for group in groups]  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(schedule.optimizer, groups, schedule.weight_decay)
    losses = _resume(checkpoint, parameters, optimizer, cost)
    resumed = len(losses)
    trim()  # what building the models left free between their parts

    def save() -> None:
        _checkpoint(checkpoint, parameters, optimizer, losses, cost)

    with progress.bar(title, schedule.steps, len(losses)) as advance, _saved_when_stopped(losses, save) as signals:
        for step in range(len(losses), schedule.steps):
            torch.manual_seed(schedule.seed * STRIDE + step)
            chosen = batch_indices(len(rows), step, schedule.batch_size, schedule.seed)
            optimizer.zero_grad(set_to_none=True)
            value = 0.0
            for part, share in shares([rows[i] for i in chosen], schedule.micro_batch, weight_of):
                loss = loss_of(part) * share
                value += float(loss.detach())
                _require_finite("loss", value, title, step, schedule, base)
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
                del loss
            norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), schedule.clip))
            _require_finite("gradient's norm", norm, title, step, schedule, base)
            with signals.held():
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * rate_factor(step, schedule)
                optimizer.step()
                losses.append(value)
            advance(1, trend(losses))
            if (step + 1) % schedule.checkpoint_every == 0 and step + 1 < schedule.steps:
                save()
        optimizer.zero_grad(set_to_none=True)
        _require_finite_tensors(parameters, title, base)
        if len(losses) > resumed:  # whatever interrupts what is done with the result need not train again
            save()
    return losses


def _require_finite_tensors(parameters: Mapping[str, Tensor], title: str, rates: list[float]) -> None:
    for name, tensor in parameters.items():
        if not bool(tensor.isfinite().all()):
            raise TrainingDiverged(f"{title}: '{name}' is NaN or infinite after the last step; {_slower(rates)}")


@contextmanager
def _saved_when_stopped(losses: list[float], save: Callable[[], None]) -> Generator[Interrupts]:
    """Where an interrupt ends the block, save the step that it is at, unless a second one broke an update off."""
    with listening() as signals:
        before = len(losses)
        try:
            yield signals
        except KeyboardInterrupt:
            if signals.whole and len(losses) > before:
                save()
                log.info("stopped behind step %d, which is kept", len(losses))
            raise


def current_step(seed: int) -> int:
    """The step that a loss is asked for, of a training of this seed: torch is seeded for it."""
    return torch.initial_seed() - seed * STRIDE


def shares(rows: list[T], micro_batch: int | None, weight_of: Callable[[T], int]) -> Iterator[tuple[list[T], float]]:
    """Rows in parts of at most `micro_batch`, each with its share of the whole weight."""
    size, whole = micro_batch or len(rows), sum(map(weight_of, rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield part, sum(map(weight_of, part)) / whole


def _require_finite(what: str, value: float, title: str, step: int, schedule: Schedule, rates: list[float]) -> None:
    if math.isfinite(value):
        return
    found = f"{title}: the {what} is {value} at step {step + 1} of {schedule.steps}"
    if step == 0:
        raise TrainingDiverged(f"{found}, before anything was learned", learned=False)
    raise TrainingDiverged(f"{found}; {_slower(rates)}")


def _slower(rates: list[float]) -> str:
    return f"try a learning rate below {max(rates):g}"


def _checkpoint(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    cost: Cost | None,
) -> None:
    state: dict[str, Any] = {
        "parameters": {name: tensor.detach() for name, tensor in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "cost": cost.so_far() if cost is not None else None,
    }
    state["seal"] = _seal(state)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # to an open file: torch's own writer hides a full disk's error


def _resume(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, cost: Cost | None
) -> list[float]:
    if not path.is_file():
        return []
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if (seal := state.pop("seal")) != _seal(state):
            raise ValueError(f"seal {seal}")
        shapes = {name: tensor.shape for name, tensor in state["parameters"].items()}
        if shapes != {name: tensor.shape for name, tensor in parameters.items()}:
            raise ValueError("of other tensors")
        losses: list[float] = list(map(float, state["losses"]))
        optimizer.load_state_dict(state["optimizer"])
        if cost is not None and (earlier := state["cost"]) is not None:
            cost.go_on(earlier)
    except Exception as error:
        raise ModelError(f"{path} is damaged or of another training; delete it to start the stage anew") from error
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(state["parameters"][name])
    log.info("resuming at step %d from %s", len(losses), path)
    return losses


def _seal(state: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint's tensors and numbers, in their order."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(f"{flat.dtype} {tuple(value.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                digest.update(repr(key).encode())
                take(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                take(inner)
        else:
            digest.update(repr(value).encode())

    take(state)
    return digest.hexdigest()
