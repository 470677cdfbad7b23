"""Counts of memory and time as a Markdown page and as a picture, the paper's numbers beside ours."""

from collections.abc import Sequence
from pathlib import Path

from plugbridge.bench.memory import Count
from plugbridge.files import write_atomically
from plugbridge.memory.rows import LORA, OURS, QLORA, jobs
from plugbridge.memory.shapes import PAPER, SHAPES

TABLES = {shape.name: shape.paper for shapes in SHAPES.values() for shape in shapes if shape.paper is not None}
MEMORY = """
Peak memory of one training step (or of what else a stage does again and again), the model, gradients and optimizer
state included, over what Python and its libraries take; seconds are of one repetition. Models have random weights and
no dropout; a row's answer is one token (two for T5), prompts are full length. The Bridge has 1/16 of the large model's
parameters, in standalone and ladder embeddings and head included; in standalone and ladder it trains, in float32,
unless it is a `frozen Bridge`. Measured rows ran in a process of their own, on the CPU with glibc told to give blocks
above 128 KiB back (MALLOC_MMAP_THRESHOLD_): otherwise freed blocks of up to 32 MiB may stay in the process. `off` is
how far a prediction is from the measurement. Predicted rows did not fit or were not asked for, or (QLoRA) are a
stand-in with packed weights; their seconds come from this machine's rates for matrix products and for all other
operations, which say little of bfloat16 on the CPU. `x LoRA` is the ratio to LoRA without checkpointing in the same
run. The paper's numbers were measured on an A100 with other kernels: compare ratios. `streamed` rows have the large
model on disk (`resident: none`), one block in memory and one read ahead; a step `row by row` goes through the models a
row at a time (`micro_batch: 1`), with the same gradient. Streamed scoring has its rows' states on disk (`score.keep:
disk`) and reads two rows, unless they are `in memory`; streamed `evaluate` reads one row. A run's peak is the largest
of its stages, importance included.
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
    kind = "measured" if count.measured else "predicted"
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
    peaks = {(count.method, count.stage): count for count in same}
    rivals = [next((count for count in same if count.method == name), None) for name in (LORA, QLORA)]
    lines: list[str] = []
    for job in jobs():
        stages = [peaks[stage] for stage in job.stages if stage in peaks]
        if len(stages) < len(job.stages):
            continue
        top = max(stages, key=lambda count: count.peak_bytes)
        ratios = [(top.ratio_to_large_bf16, job.limit)]
        ratios += [(top.peak_bytes / r.peak_bytes, most) for r, most in zip(rivals, (0.1, 0.5), strict=True) if r]
        cells = [f"{ratio:.2f} (target {most:g}: {'kept' if ratio <= most else 'missed'})" for ratio, most in ratios]
        how = "measured" if all(count.measured for count in stages) else "predicted in part"
        lines.append(f"| {job.name} | {top.stage} | {top.peak_bytes / 2**20:,.0f} | {' | '.join(cells)} | {how} |")
    return [*JOBS, *lines] if lines else []


def paper_bytes(count: Count) -> int | None:
    """The paper's MiB for the same method on the same model; its plug-in stands beside every mode of ours."""
    numbers = PAPER.get(TABLES.get(count.model) or "", {})
    return numbers.get(count.method.partition(",")[0] if count.method.startswith(f"{OURS}:") else count.method)


def draw_memory(counts: Sequence[Count], paths: Sequence[Path]) -> None:
    """Bars of peak memory, a panel for each model; hatched bars are predictions, dots the paper's numbers."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(count.model for count in counts))
    most = max(sum(count.model == model for count in counts) for model in models)
    figure = Figure(figsize=(7.4 * len(models), 0.28 * most + 1.4), layout="constrained")
    for column, model in enumerate(models):
        same = [count for count in counts if count.model == model]
        axes = figure.add_subplot(1, len(models), column + 1)
        names = [f"{count.method}: {count.stage}" if count.method == OURS else count.method for count in same]
        bars = axes.barh(
            names, [count.peak_bytes / 2**30 for count in same], edgecolor="white",
            color=["#c1440e" if count.method.startswith(OURS) else "#3b6ea5" for count in same],
        )  # fmt: skip
        for bar, count in zip(bars, same, strict=True):
            bar.set_hatch("" if count.measured else "//")
        known = [(name, paper_bytes(count)) for name, count in zip(names, same, strict=True)]
        dots = [(name, value / 2**10) for name, value in known if value is not None]
        if dots:
            axes.plot([x for _, x in dots], [y for y, _ in dots], "o", ms=4, color="#1b1b1b", label="the paper")
            axes.legend(fontsize=8, frameon=False)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.set_title(f"{model}, batch {same[0].batch} x {same[0].length}", fontsize=10, loc="left")
        axes.set_xlabel("peak GiB of a step (hatched: predicted)", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for path in paths:
        with write_atomically(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=140)
