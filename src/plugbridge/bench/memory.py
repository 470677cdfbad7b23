"""Memory and time of our stages and of what else one could do, side by side: measured where it fits, else predicted."""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from plugbridge.errors import ConfigError
from plugbridge.files import write_json
from plugbridge.memory.case import Case
from plugbridge.memory.measure import measured
from plugbridge.memory.predict import predict
from plugbridge.memory.rates import Rates, measure_rates
from plugbridge.memory.rows import Row, baselines, common_stages, coupled, small_steps
from plugbridge.memory.shapes import Shape
from plugbridge.memory.weights import write_weights
from plugbridge.models import parameter_count
from plugbridge.progress import Progress
from plugbridge.tensors.writer import NAMES

log = logging.getLogger(__name__)

METHODS = ("adapter", "prefix", "lora")
MODES = ("feedback", "ladder_delta", "ladder", "standalone")
ROOM = 1.25
"""A step is run where so many times its predicted peak is free."""


@dataclass(frozen=True)
class Count:
    """What one step takes on one model.

    `peak_bytes` holds the model and all else that the step keeps; `seconds` are of one repetition. `predicted_bytes`
    stands beside a measured peak, too. `ratio_to_large_bf16` is the peak over the large model's weights in bfloat16,
    what it takes to merely hold the model.
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


Key = tuple[str, int, int, str, str]
"""Model, batch, length, method and stage of a count."""


@dataclass(frozen=True)
class Machine:
    """Where steps run: with `room` bytes and so many threads; `weights` is a directory for models on disk.

    A step is run if it fits and one of `only` is in its name, ``method: stage``; everything else is predicted.
    After `until`, a time of `time.monotonic`, no further one is begun.
    """

    room: int
    device: str
    threads: int
    weights: Path
    only: tuple[str, ...] = ()
    until: float | None = None

    def chooses(self, row: Row) -> bool:
        """Whether a row is to be run, if it fits."""
        name = f"{row.method}: {row.stage}"
        return row.real and (not self.only or any(part in name for part in self.only))


def key_of(count: Count) -> Key:
    """What a count is of."""
    return count.model, count.batch, count.length, count.method, count.stage


def rows_of(shape: Shape, device: str) -> list[Row]:
    """Everything that is counted on one pair."""
    large = Case(shape.large, shape.batch, shape.length, device=device)
    rows = baselines(large, METHODS) + common_stages(large, replace(large, config=shape.small))
    rows += [coupled(large, mode) for mode in MODES]
    rows += [coupled(large, mode, method) for method in METHODS[:2] for mode in ("feedback", "standalone")]
    small = replace(large, config=shape.small)
    return rows + [row for half in (False, True) for row in small_steps(large, small, MODES, half)]


def count_shape(
    shape: Shape, rows: Sequence[Row], machine: Machine, path: Path, command: str, progress: Progress
) -> list[Count]:
    """Count every row and keep the counts in a JSON file; what was measured there before is not measured again.

    With a time to end, what the same command predicted there is not predicted again either, and the rows that were not
    begun are left out; one is counted in any case, so that the command gets on.
    """
    weights = 2 * weights_of(Case(shape.large, 1, 1))
    rates = {dtype: measure_rates(dtype, machine.device, machine.threads) for dtype in {row.case.dtype for row in rows}}
    before, own = read_counts(path), (shape.name, shape.batch, shape.length)
    others = [count for key, count in before.items() if key[:3] != own]
    final = {key: c for key, c in before.items() if machine.until is not None and c.command == command}
    known = {key: c for key, c in before.items() if key[:3] == own and (c.measured or key in final)}
    found: list[Count] = []
    begun = False
    with progress.bar(f"bench memory, {shape.name}", len(rows)) as advance:
        for row in rows:
            key = (*own, row.method, row.stage)
            if key not in final and begun and machine.until is not None and time.monotonic() >= machine.until:
                continue
            if key in final:
                count = final[key]
            else:
                count, begun = (
                    _count(shape, row, machine, rates[row.case.dtype], weights, command, known.get(key)),
                    True,
                )
            found.append(count)
            rest = [count for key, count in known.items() if key not in map(key_of, found)]
            write_counts([*others, *found, *rest], path)
            advance(1)
    return found


def _count(
    shape: Shape, row: Row, machine: Machine, rates: Rates, weights: int, command: str, before: Count | None
) -> Count:
    count = _predicted(shape, row, rates, weights, command)
    if before is not None and before.measured:
        return replace(before, predicted_bytes=count.predicted_bytes)
    if not machine.chooses(row) or ROOM * count.predicted_bytes > machine.room:
        return count
    log.info("%s, %s: %s, predicted %.0f MiB and %.0f s a repetition", shape.name, row.method, row.stage,
             count.peak_bytes / 2**20, count.seconds)  # fmt: skip
    real = measured(_on_disk(row.case, shape, machine.weights), row.make, machine.threads)
    ratio = real.peak_bytes / weights
    return replace(count, peak_bytes=real.peak_bytes, seconds=real.seconds, measured=True, ratio_to_large_bf16=ratio)


def _predicted(shape: Shape, row: Row, rates: Rates, weights: int, command: str) -> Count:
    counts = predict(replace(row.case, device="cpu"), row.make)
    return Count(
        shape.name, shape.batch, shape.length, row.method, row.stage, counts.peak, counts.peak, rates.seconds(counts),
        False, counts.peak / weights, command,
    )  # fmt: skip


def _on_disk(case: Case, shape: Shape, folder: Path) -> Case:
    """A case whose streamed model is read from random weights on disk."""
    if not case.streamed:
        return case
    name = re.sub(r"[^\w]+", "-", f"{shape.name}-{NAMES[case.dtype]}").lower()
    return replace(case, weights=str(write_weights(case, folder / name)))


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
        counts = [Count(**row) for row in list(json.loads(path.read_text(encoding="utf-8")))]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no counts of `bench memory`; move it away or name another --table") from error
    return {key_of(count): count for count in counts}
