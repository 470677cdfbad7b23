"""Memory and time of our stages and of what else one could do, side by side: measured where it fits, else predicted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from plugbridge.files import write_json
from plugbridge.memory.case import Case
from plugbridge.memory.measure import measured
from plugbridge.memory.predict import predict
from plugbridge.memory.rates import Rates, measure_rates
from plugbridge.memory.rows import Row, baselines, common_stages, coupled
from plugbridge.memory.shapes import Shape
from plugbridge.models import parameter_count
from plugbridge.progress import Progress

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


def rows_of(shape: Shape, device: str) -> list[Row]:
    """Everything that is counted on one pair."""
    large = Case(shape.large, shape.batch, shape.length, device=device)
    rows = baselines(large, METHODS) + common_stages(large, replace(large, config=shape.small))
    rows += [coupled(large, mode) for mode in MODES]
    return rows + [coupled(large, mode, method) for method in METHODS[:2] for mode in ("feedback", "standalone")]


def count_shape(
    shape: Shape, rows: Sequence[Row], room: int, device: str, threads: int, command: str, progress: Progress
) -> list[Count]:
    """Count every row: run it where `room` bytes are enough, else predict it."""
    weights = 2 * weights_of(Case(shape.large, 1, 1))
    rates = {row.case.dtype: measure_rates(row.case.dtype, device, threads) for row in rows}
    found: list[Count] = []
    with progress.bar(f"bench memory, {shape.name}", len(rows)) as advance:
        for row in rows:
            found.append(_count(shape, row, room, threads, rates[row.case.dtype], weights, command))
            advance(1)
    return found


def _count(shape: Shape, row: Row, room: int, threads: int, rates: Rates, weights: int, command: str) -> Count:
    counts = predict(replace(row.case, device="cpu"), row.make)
    peak, seconds = counts.peak, rates.seconds(counts)
    run = row.real and ROOM * counts.peak <= room
    if run:
        real = measured(row.case, row.make, threads)
        peak, seconds = real.peak_bytes, real.seconds
    return Count(
        shape.name, shape.batch, shape.length, row.method, row.stage, peak, counts.peak, seconds, run, peak / weights,
        command,
    )  # fmt: skip


def weights_of(case: Case) -> int:
    """Parameters of a case's model, counted without making one."""
    return parameter_count(replace(case, device="meta").build()[0])


def write_counts(counts: Sequence[Count], path: Path) -> None:
    """The counts as one JSON list."""
    write_json(path, [asdict(count) for count in counts])
