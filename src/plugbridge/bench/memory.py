"""Memory and time of our stages and of what else one could do, side by side: measured where it fits, else predicted."""

import logging
import re
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from plugbridge.errors import ConfigError, PlugbridgeError
from plugbridge.files import write_json
from plugbridge.memory.case import Case
from plugbridge.memory.measure import lasting, measured
from plugbridge.memory.predict import predict
from plugbridge.memory.rates import Rates, primitive_bytes, rates_for, seconds_of
from plugbridge.memory.rows import LORA, QLORA, Row, baselines, common_stages, coupled, jobs, peers, small_steps
from plugbridge.memory.shapes import Shape
from plugbridge.memory.weights import keep_only, write_weights
from plugbridge.models import parameter_count
from plugbridge.parsing import read_json
from plugbridge.progress import Progress
from plugbridge.tensors.writer import NAMES

log = logging.getLogger(__name__)

METHODS = ("adapter", "prefix", "lora")
MODES = ("feedback", "ladder_delta", "ladder", "standalone")
ROOM = 1.25
"""A step is run where so many times its predicted peak is free."""
LIMITS = (MemoryError, OSError, PlugbridgeError, BrokenProcessPool, torch.OutOfMemoryError)
"""What a step that the machine is too small for ends with; anything else is a bug and keeps its traceback."""
STOPPED = "stopped before it ended"


@dataclass(frozen=True)
class Count:
    """What one step takes on one model.

    `peak_bytes` holds the model and all else that the step keeps; `seconds` are of one repetition. `predicted_bytes`
    stands beside a measured peak, too. `ratio_to_large_bf16` is the peak over the large model's weights in bfloat16,
    what it takes to merely hold the model. `failed` says why a step that was tried stands here as predicted.
    `weight_bytes` are those of the models' weights that a repetition reads, from memory or disk, as often as it does:
    counted from shapes; None in a file of before they were.
    """

    model: str
    batch: int
    length: int
    method: str
    stage: str
    peak_bytes: int
    predicted_bytes: int
    seconds: float
    measured: bool
    ratio_to_large_bf16: float
    command: str
    failed: str = ""
    weight_bytes: int | None = None


Key = tuple[str, int, int, str, str]
"""Model, batch, length, method and stage of a count."""


@dataclass(frozen=True)
class Machine:
    """Where steps run: with `room` bytes and so many threads; `weights` is a directory for models on disk.

    A step is run if it fits and one of `only` is in its name, ``method: stage``; everything else is predicted.
    After `until`, a time of `time.monotonic`, no further one is begun, nor one that is predicted to end later.
    Unless `keep_weights`, nothing is in `weights` but the model that the step reads or the next one will.
    """

    room: int
    device: str
    threads: int
    weights: Path
    only: tuple[str, ...] = ()
    until: float | None = None
    keep_weights: bool = True

    def ends(self, seconds: float) -> bool:
        """Whether what takes so long would end in time."""
        return self.until is None or time.monotonic() + seconds < self.until

    def chooses(self, row: Row) -> bool:
        """Whether a row is to be run, if it fits."""
        return not self.only or any(part in row.name for part in self.only)


def key_of(count: Count) -> Key:
    """What a count is of."""
    return count.model, count.batch, count.length, count.method, count.stage


def rows_of(shape: Shape, device: str) -> list[Row]:
    """Everything that is counted on one pair."""
    large = Case(shape.large, shape.batch, shape.length, device=device)
    rows = baselines(large, METHODS) + common_stages(large, replace(large, config=shape.small))
    rows += [coupled(large, shape.small, mode) for mode in MODES]
    rows += [coupled(large, shape.small, mode, method) for method in METHODS[:2] for mode in ("feedback", "standalone")]
    rows += peers(large, shape.small)
    small = replace(large, config=shape.small)
    return rows + [row for half in (False, True) for row in small_steps(large, small, MODES, half)]


def count_shape(
    shape: Shape, rows: Sequence[Row], machine: Machine, path: Path, command: str, progress: Progress
) -> list[Count]:
    """Count every row and keep the counts in a JSON file; what was measured there before is not measured again.

    A row that cannot be measured stays predicted, and the log says why. With a time to end, what the same command
    predicted there is neither predicted nor tried again, what the targets are about comes first, and the rows that were
    not begun are left out; one is counted in any case, so that the command gets on.
    """
    weights = 2 * weights_of(Case(shape.large, 1, 1))
    rates = rates_for((row.case for row in rows), machine.device, machine.threads)
    each = primitive_bytes(machine.device, rates)
    counts = _Counts(shape, rows, path, command, timed=machine.until is not None)
    todo = [row for row in rows if counts.key(row) not in counts.found]
    if machine.until is not None:
        todo.sort(key=_turn)
    left: list[Row] = []
    begun = False
    with progress.bar(f"bench memory, {shape.name}", len(rows), len(rows) - len(todo)) as advance:
        for place, row in enumerate(todo):
            if begun and not machine.ends(0):
                left += todo[place:]
                break
            advance(0, row.name)
            count = _predicted(shape, row, rates, each, weights, command)
            before = counts.measured(row)
            if before is not None:
                count = replace(before, predicted_bytes=count.predicted_bytes, weight_bytes=count.weight_bytes)
            elif machine.chooses(row) and ROOM * count.predicted_bytes <= machine.room:
                if begun and not machine.ends(lasting(count.seconds)):
                    left.append(row)
                    continue
                _clear(shape, todo[place:], machine)
                with counts.tried(row, count, marked=not begun and machine.until is not None and machine.ends(0)):
                    count = _run(shape, row, machine, weights, count)
            begun = True
            counts.keep(row, count)
            advance(1)
    _clear(shape, left, machine)
    return counts.in_order()


class _Counts:
    """The counts of one shape while they are made, and the file that has them and those of other shapes.

    `timed` takes what the same command predicted before for final.
    """

    def __init__(self, shape: Shape, rows: Sequence[Row], path: Path, command: str, timed: bool) -> None:
        self.path, self.own = path, (shape.name, shape.batch, shape.length)
        self.keys = [self.key(row) for row in rows]
        before = read_counts(path)
        self.others = [count for key, count in before.items() if key[:3] != self.own]
        final = {key: count for key, count in before.items() if timed and count.command == command}
        self.known = {key: c for key, c in before.items() if key[:3] == self.own and (c.measured or key in final)}
        self.found = {key: final[key] for key in self.keys if key in final}

    def key(self, row: Row) -> Key:
        """What a row's count is of."""
        return (*self.own, row.method, row.stage)

    def measured(self, row: Row) -> Count | None:
        """What an earlier call measured."""
        count = self.known.get(self.key(row))
        return count if count is not None and count.measured else None

    def in_order(self) -> list[Count]:
        """What is counted, in the order of the rows."""
        return [self.found[key] for key in self.keys if key in self.found]

    def keep(self, row: Row, count: Count) -> None:
        """Take a count in, and write all of them."""
        self.found[self.key(row)] = count
        self._write()

    @contextmanager
    def tried(self, row: Row, count: Count, marked: bool) -> Generator[None]:
        """Around a measurement; while a marked one goes on the file says that it was stopped.

        So a row that a whole call was too short for is not begun by every later call.
        """
        if marked:
            self.keep(row, replace(count, failed=STOPPED))
        try:
            yield
        except BaseException:
            if self.found.pop(self.key(row), None) is not None:
                self._write()
            raise

    def _write(self) -> None:
        rest = [count for key, count in self.known.items() if key not in self.found]
        write_counts([*self.others, *self.in_order(), *rest], self.path)


def _turn(row: Row) -> int:
    """When a row's turn is: first the targets', and each dtype's rows that are read from disk before the next dtype's.

    The weights of all dtypes need not be on disk at once.
    """
    target = any((row.method, row.stage) in job.stages for job in jobs())
    if row.case.streamed:
        return (0 if target else 2) if row.case.dtype is torch.bfloat16 else (3 if target else 4)
    return 1 if target or row.method.startswith((LORA, QLORA)) else 5


def _run(shape: Shape, row: Row, machine: Machine, weights: int, predicted: Count) -> Count:
    name = f"{shape.name}, {row.name}"
    log.info("%s, predicted %.0f MiB and %.0f s a repetition", name, predicted.peak_bytes / 2**20, predicted.seconds)
    try:
        real = measured(_on_disk(row.case, shape, machine.weights), row.make, machine.threads)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.warning("%s stays predicted: %s", name, why, exc_info=not isinstance(error, LIMITS))
        return replace(predicted, failed=why)
    ratio = real.peak_bytes / weights
    return replace(
        predicted, peak_bytes=real.peak_bytes, seconds=real.seconds, measured=True, ratio_to_large_bf16=ratio
    )


def _predicted(
    shape: Shape, row: Row, rates: Mapping[torch.dtype, Rates], each: int, weights: int, command: str
) -> Count:
    counts = predict(replace(row.case, device="cpu"), row.make).keeping(each)
    return Count(
        shape.name, shape.batch, shape.length, row.method, row.stage, counts.peak, counts.peak,
        seconds_of(counts, rates), False, counts.peak / weights, command, weight_bytes=round(counts.used + counts.read),
    )  # fmt: skip


def _on_disk(case: Case, shape: Shape, folder: Path) -> Case:
    """A case whose model is read from random weights on disk, if it is read from files."""
    if not case.reads_files:
        return case
    return replace(case, weights=str(write_weights(case, folder / _folder_name(shape, case))))


def _folder_name(shape: Shape, case: Case) -> str:
    return re.sub(r"[^\w]+", "-", f"{shape.name}-{NAMES[case.dtype]}").lower()


def _clear(shape: Shape, rows: Sequence[Row], machine: Machine) -> None:
    """Leave no weights but those of the first of these rows that reads any, unless all are to stay."""
    if not machine.keep_weights:
        read = (row.case for row in rows if row.case.reads_files)
        keep_only(machine.weights, next((_folder_name(shape, case) for case in read), None))


def weights_of(case: Case) -> int:
    """Parameters of a case's model, counted without making one."""
    return parameter_count(case.on_meta()[0])


def write_counts(counts: Sequence[Count], path: Path) -> None:
    """The counts as one JSON list."""
    write_json(path, [asdict(count) for count in counts])


def read_counts(path: Path) -> Mapping[Key, Count]:
    """Counts that a file holds, by what they are of; none where there is no file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        counts = TypeAdapter(list[Count]).validate_python(read_json(path, ConfigError))
    except (ConfigError, ValidationError) as error:
        raise ConfigError(f"{path} holds no counts of `bench memory`; move it away or name another --table") from error
    return {key_of(count): count for count in counts}
