"""Counts of memory and time as Markdown pages, the paper's numbers beside ours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plugbridge.bench.cells import Reproduced
from plugbridge.bench.memory import Count
from plugbridge.memory.rows import LORA, OURS, QLORA, Job, jobs, resident_jobs
from plugbridge.memory.shapes import PAPER, SHAPES

TABLES = {shape.name: shape.paper for shapes in SHAPES.values() for shape in shapes if shape.paper is not None}
MEMORY = """
Peak memory of one training step (or of what else a stage does again and again), the model, gradients and optimizer
state included, over what Python and its libraries take; seconds are of one repetition. Models have random weights and
no dropout; a row's answer is one token (two for T5), prompts are full length. The Bridge has 1/16 of the large
model's parameters, in standalone and ladder embeddings and head included. There it trains, in float32, unless it is a
`frozen Bridge`: in ladder with AdamW, in standalone with Adafactor, its default, or with `AdamW`
(`couple.optimizer`). Measured rows ran in a process of their own, on the CPU with glibc told to give blocks above 128
KiB back (MALLOC_MMAP_THRESHOLD_): otherwise freed blocks of up to 32 MiB may stay in the process. `off` is how far a
prediction is from the measurement. Predicted rows did not fit, were not asked for or failed; their seconds come from
this machine's rates for matrix products and for all other operations, which say little of bfloat16 on the CPU. `x
LoRA` is the ratio to LoRA without checkpointing, measured or predicted. The paper's numbers were measured on an A100
with other kernels: compare ratios. `streamed` rows have the large model on disk (`resident: none`), one block in
memory and one read ahead; a step `row by row` goes through the models a row at a time (`micro_batch: 1`), with the
same gradient. Streamed scoring has its rows' states on disk (`score.keep: disk`) and reads two rows, unless they are
`in memory`; streamed `evaluate` reads one row. A run's peak is the largest of its stages, importance included.
"""
HEAD = "| | stage | MiB | x bf16 weights | x LoRA | seconds | | predicted MiB | off | paper MiB | x paper's LoRA |"

JOBS = [
    "Whole runs of ours with little memory (`resident: none`, `score.keep: disk`, `micro_batch: 1`), all stages, "
    "importance included:",
    "",
    "| run | stage of the peak | MiB | x bf16 weights | x LoRA | x QLoRA | |",
    "|---|---|---|---|---|---|---|",
]


def memory_page(counts: Sequence[Count], about: str, command: str) -> str:
    """A Markdown page with a table for each model, and every command that a row of it comes from."""
    commands = dict.fromkeys([*(count.command for count in counts), command])
    lines = ["# Memory and time", "", about.strip(), "", "Made by", "", *(f"    {made}" for made in commands), ""]
    for model in dict.fromkeys(count.model for count in counts):
        same = [count for count in counts if count.model == model]
        table = TABLES.get(model)
        beside = f"; the paper's {table} beside it" if table is not None else ""
        lines += [f"## {model}, batch {same[0].batch} x {same[0].length}{beside}", "", HEAD, "|---" * 11 + "|"]
        lines += [_line(count, same) for count in same]
        lines += ["", *_jobs(same), ""]
    return "\n".join(lines)


def _line(count: Count, same: Sequence[Count]) -> str:
    lora = next((other for other in same if other.method == LORA), None)  # not counted yet
    ratio = "" if lora is None else f"{count.peak_bytes / lora.peak_bytes:.2f}"
    paper = paper_bytes(count)
    kind = "measured" if count.measured else f"predicted ({count.failed})" if count.failed else "predicted"
    off = f"{count.predicted_bytes / count.peak_bytes - 1:+.0%}" if count.measured else ""
    beside = "| | |"
    if paper is not None:
        beside = f"| {paper:,} | {paper / PAPER[TABLES[count.model]]['LoRA']:.2f} |"
    return (
        f"| {count.method} | {count.stage} | {count.peak_bytes / 2**20:,.0f} | {count.ratio_to_large_bf16:.2f} "
        f"| {ratio} | {count.seconds:.2f} | {kind} "
        f"| {count.predicted_bytes / 2**20:,.0f} | {off} {beside}"
    )


def _jobs(same: Sequence[Count]) -> list[str]:
    """Whole runs of ours: the largest of their stages, and whether it keeps to the targets."""
    rivals = [next((count for count in same if count.method == name), None) for name in (LORA, QLORA)]
    lines: list[str] = []
    for run in whole_runs(jobs(), same):
        ratios = [(run.top.ratio_to_large_bf16, run.limit or math.inf)]
        ratios += [(run.top.peak_bytes / r.peak_bytes, most) for r, most in zip(rivals, (0.1, 0.5), strict=True) if r]
        judged = TABLES.get(same[0].model) == "Table 6"  # what the targets are about
        cells = [f"{ratio:.2f}{_verdict(ratio, most) if judged else ''}" for ratio, most in ratios]
        how = "measured" if run.measured else "predicted in part"
        peak = f"{run.top.peak_bytes / 2**20:,.0f}"
        lines.append(f"| {run.name} | {run.top.stage} | {peak} | {' | '.join(cells)} | {how} |")
    return [*JOBS, *lines] if lines else []


def _verdict(ratio: float, most: float) -> str:
    return f" (target {most:g}: {'kept' if ratio <= most else 'missed'})"


@dataclass(frozen=True)
class WholeRun:
    """A run whose stages are counted: the one with the largest peak, and whether all were measured.

    `paper` are the MiB that the paper reports for its training step.
    """

    name: str
    top: Count
    measured: bool
    limit: float | None
    paper: int | None


def whole_runs(wanted: Sequence[Job], same: Sequence[Count]) -> list[WholeRun]:
    """Runs on one model, without those of which a stage is not counted."""
    peaks = {(count.method, count.stage): count for count in same}
    found: list[WholeRun] = []
    for job in wanted:
        stages = [peaks[stage] for stage in job.stages if stage in peaks]
        if len(stages) == len(job.stages):
            top = max(stages, key=lambda count: count.peak_bytes)
            paper = next(filter(None, map(paper_bytes, stages)), None)
            found.append(WholeRun(job.name, top, all(count.measured for count in stages), job.limit, paper))
    return found


REDUCTION = "times less than full fine-tuning"


def paper_cells(counts: Sequence[Count], table: str, mode: str) -> list[Reproduced]:
    """The rows of the paper's table: a training step's MiB, the plug-in's in a coupling mode; empty if not measured.

    Beside it how often that goes into full fine-tuning's, as the paper's MR.
    """
    found: list[Reproduced] = []
    for model in dict.fromkeys(count.model for count in counts):
        known = {count.method: count for count in counts if count.model == model}
        said: Mapping[str, int] = PAPER[TABLES[model]] if model in TABLES else {}
        whole: tuple[float | None, float | None] = (None, None)
        for place, method in enumerate(PAPER["Table 6"]):
            count = known.get(f"{method}, {mode}" if method.startswith(f"{OURS}:") else method)
            value = count.peak_bytes / 2**20 if count is not None and count.measured else None
            printed = said.get(method)
            whole = (value, printed) if place == 0 else whole  # full fine-tuning
            shares = [_times(*pair) for pair in zip(whole, (value, printed), strict=True)]
            how = "not run" if count is None else _how(count)
            for metric, ours, paper in (("MiB", value, printed), (REDUCTION, *shares)):
                less = None if ours is None or paper is None else ours - paper
                found.append(Reproduced(table, method, model, metric, paper, ours, less, None, how))
    return found


def _times(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole / part


def _how(count: Count) -> str:
    if count.measured:
        return "measured in a process of its own"
    return f"predicted {count.peak_bytes / 2**20:,.0f} MiB{f' ({count.failed})' if count.failed else ''}"


RUNS = """
Peak memory of whole runs: of ours the largest of all stages, tuning the small model and scoring the large one included,
of other ways their training step. Every count is as in Tables 6 and 7. In `streamed` runs the large model stays on disk
and steps go through it row by row. The paper counts the coupling step alone; dots are its numbers.
"""


def runs_page(counts: Sequence[Count], command: str) -> str:
    """Figure 1(a) as a Markdown table."""
    lines = ["# Figure 1(a): memory", "", RUNS.strip(), "", "Made by", "", f"    {command}", ""]
    for model in dict.fromkeys(count.model for count in counts):
        same = [count for count in counts if count.model == model]
        lora = next((count.peak_bytes for count in same if count.method == LORA), None)
        lines += [f"## {model}, batch {same[0].batch} x {same[0].length}", ""]
        lines += ["| | stage of the peak | MiB | x LoRA | | paper MiB |", "|---|---|---|---|---|---|"]
        for name, run in named_runs(same).items():
            ratio = "" if lora is None else f"{run.top.peak_bytes / lora:.2f}"
            paper = "" if run.paper is None else f"{run.paper:,}"
            how = "measured" if run.measured else "predicted"
            lines.append(
                f"| {name} | {run.top.stage} | {run.top.peak_bytes / 2**20:,.0f} | {ratio} | {how} | {paper} |"
            )
        lines.append("")
    return "\n".join(lines)


def named_runs(same: Sequence[Count]) -> dict[str, WholeRun]:
    """Other ways to tune a model, and whole runs of ours, by name."""
    others = [Job(count.method, ((count.method, count.stage),)) for count in same if not count.method.startswith(OURS)]
    ours = [*resident_jobs(), *jobs()]
    found = {run.name: run for run in whole_runs(others, same)}
    return found | {f"{OURS}: {run.name}": run for run in whole_runs(ours, same)}


def paper_bytes(count: Count) -> int | None:
    """The paper's MiB for the same method on the same model; its plug-in stands beside every mode of ours."""
    numbers = PAPER.get(TABLES.get(count.model) or "", {})
    return numbers.get(count.method.partition(",")[0] if count.method.startswith(f"{OURS}:") else count.method)
