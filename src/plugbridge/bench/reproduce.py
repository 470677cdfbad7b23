"""`plugbridge reproduce`: one table or figure of the paper on the models given."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from plugbridge.bench.asked import MEMORY_TABLES, Asked, check_asked, choice_of
from plugbridge.bench.cells import as_rows, collect, count_table, do_runs, home_of, named, run_table
from plugbridge.bench.commits import commits_of_run, commits_said
from plugbridge.bench.memory import Machine, count_shape, rows_of
from plugbridge.bench.memory_figure import draw_runs, draw_steps
from plugbridge.bench.memory_page import MEMORY, memory_page, paper_cells, runs_page
from plugbridge.bench.paper import DEMO_TASK, load_paper
from plugbridge.bench.similarity import Likeness, compare, draw_likeness, mean_by_comparison, similarity_configs
from plugbridge.bench.tables import latex, markdown
from plugbridge.cost import free_memory
from plugbridge.errors import ConfigError
from plugbridge.files import write_json, write_text
from plugbridge.memory.rows import OURS, run_stages
from plugbridge.memory.shapes import Shape, find_shapes
from plugbridge.models import load_config, pick_device
from plugbridge.progress import Progress
from plugbridge.report import read_report
from plugbridge.sources import commits_of, pinned

MODE_NOTE = (
    "Plug-in rows are coupled in mode `{mode}`, with a Bridge of at most 1/16 of the large model's parameters where "
    "the row says nothing else, seed {seed}."
)
DEMO_NOTE = "{what} in for the paper's, which have no value to compare with."
COUNT_NOTE = (
    "#Params are what a tuned model's checkpoint adds or changes; the paper prints 0 % for plug-ins, since none of the "
    "large model's own parameters is updated."
)
SPLIT_NOTE = "Test rows are the official validation files: SuperGLUE's test labels are not public."
Announce = Callable[[str, str], None]


def reproduce(asked: Asked, progress: Progress, announce: Announce) -> Iterator[str]:
    """Make it and write it; yields what to print. Raises ConfigError."""
    check_asked(asked)
    if asked.table == "table2":
        return _counts(asked)
    if asked.table in MEMORY_TABLES:
        return _memory(asked, progress)
    if asked.table == "fig1b":
        return _likeness(asked, progress, announce)
    return _table(asked, progress, announce)


def _memory(asked: Asked, progress: Progress) -> Iterator[str]:
    """Tables 6 and 7 and Figure 1(a): measured where it fits in what is free, else predicted and marked so."""
    place = 1 if asked.table == "table7" else 0
    shape = find_shapes("small" if asked.demo else "paper")[place]
    if asked.pair is not None:
        sources = [pinned(source) for source in asked.pair]
        small, large = (load_config(source) for source in sources)
        name = ", ".join(filter(None, ("/".join(Path(sources[1]).parts[-2:]), commits_said(commits_of(*sources)))))
        shape = Shape(name, large, small, shape.batch, shape.length)
    device = pick_device("auto")
    room = 0 if asked.summary else free_memory(device)
    machine = Machine(room, device, 1, asked.root / "weights")
    path = asked.page.with_suffix(".json")
    rows, pictures = rows_of(shape, device), [asked.page.with_suffix(ending) for ending in (".png", ".svg")]
    if asked.table == "fig1a":
        rows = [row for row in rows if not row.method.startswith(OURS) or (row.method, row.stage) in run_stages()]
    counts = count_shape(shape, rows, machine, path, asked.command, progress)
    if asked.table == "fig1a":
        write_text(asked.page, runs_page(counts, asked.command))
        draw_runs(counts, pictures)
    else:
        title = f"{_number(asked)}: peak memory of a training step"
        cells = paper_cells(counts, asked.table, asked.mode)
        note = f"Plug-in rows (ours) are coupled in mode `{asked.mode}`; every step, and how it was counted, below."
        every = memory_page(counts, MEMORY, asked.command).replace("# Memory and time", "## Every step", 1)
        write_text(asked.page, f"{markdown(cells, title, note, asked.command)}\n{every}")
        write_text(asked.page.with_suffix(".tex"), latex(cells, title, note, asked.command))
        write_json(asked.page.with_name(f"{asked.page.stem}_rows.json"), as_rows(cells))
        draw_steps(counts, pictures)
    yield asked.page.read_text(encoding="utf-8")
    yield f"{asked.page}, {'' if asked.table == 'fig1a' else '.tex, _rows.json, '}.png, .svg and .json beside it"


def _table(asked: Asked, progress: Progress, announce: Announce) -> Iterator[str]:
    table = load_paper().tables[asked.table]
    choice = choice_of(asked, table.pair)
    reasons: dict[str, str] = {}
    if not asked.summary:
        reasons = run_table(asked.table, table, choice, asked.tasks, asked.data, asked.root, progress, announce)
    cells = collect(asked.table, table, choice, asked.tasks, asked.root, reasons)
    own = asked.demo or asked.pair is not None
    title = f"{_number(asked)}: {f'its rows on {named(choice.pair)}' if own else table.title}"
    made = f"{MODE_NOTE.format(mode=asked.mode, seed=asked.seed)} Models: {named(choice.pair)}."
    counted = COUNT_NOTE if table.counts_parameters else ""
    shipped = "The shipped task stands" if asked.pair is not None else "The shipped pair and task stand"
    notes = [DEMO_NOTE.format(what=shipped), table.note] if asked.demo else [table.note, table.printed, SPLIT_NOTE]
    note = " ".join(filter(None, [*notes, made, counted]))
    write_text(asked.page, markdown(cells, title, note, asked.command))
    write_text(asked.page.with_suffix(".tex"), latex(cells, title, note, asked.command))
    write_json(asked.page.with_suffix(".json"), as_rows(cells))
    yield asked.page.read_text(encoding="utf-8")
    done = sum(cell.value is not None for cell in cells)
    yield f"{done} of {len(cells)} cells; {asked.page}, .tex and .json beside it"


def _number(asked: Asked) -> str:
    return f"Table {asked.table.removeprefix('table')}"


def _counts(asked: Asked) -> Iterator[str]:
    counts = load_paper().counts
    names = ["gpt2"] if asked.pair is not None else ["gpt2", "t5-3b"] if asked.demo else list(counts.pairs)
    pairs = {name: choice_of(asked, name).pair for name in names}
    if asked.demo:  # which are of the families, not of the sizes
        pairs = {name.partition("-")[0]: pair for name, pair in pairs.items()}
    own = asked.pair is not None or asked.demo
    if asked.pair is not None:
        pairs = {"your pair": pairs["gpt2"]}
    cells = count_table(counts, pairs, printed=not own)
    title = f"{_number(asked)}: {counts.title}"
    write_text(asked.page, markdown(cells, title, counts.note, asked.command))
    write_text(asked.page.with_suffix(".tex"), latex(cells, title, counts.note, asked.command))
    write_json(asked.page.with_suffix(".json"), as_rows(cells))
    yield asked.page.read_text(encoding="utf-8")


def _likeness(asked: Asked, progress: Progress, announce: Announce) -> Iterator[str]:
    """Figure 1(b), on RTE with LoRA as in the paper, or on the task asked for: both of the paper's small models."""
    pairs = ("gpt2",) if asked.demo or asked.pair is not None else ("gpt2", "gpt2-medium")
    task, *more = asked.tasks or (DEMO_TASK if asked.demo else "rte",)
    if more:
        raise ConfigError("fig1b is about one task; give --task once")
    found: dict[str, list[Likeness]] = {}
    commits: dict[str, dict[str, str]] = {}
    for choice in (choice_of(asked, pair) for pair in pairs):
        configs = similarity_configs(choice, task, "lora")
        folder = home_of(asked.root, choice, "fig1b")
        reasons = {} if asked.summary else do_runs(configs, folder, asked.data, progress, announce)
        if reasons:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ConfigError(f"figure 1b needs all three runs; {why}")
        folders = [folder / name for name in configs]
        for done in folders:
            read_report(done)
        title = f"What LoRA adds on {task}: {named(choice.pair)}"
        found[title], commits[title] = compare("lora", *folders), commits_of_run(folders[0])
    for ending in (".png", ".svg"):
        draw_likeness(found, asked.page.with_suffix(ending))
    lines = ["# Figure 1(b): how alike the modules are", "", ABOUT, "", "Made by", "", f"    {asked.command}", ""]
    for title, places in found.items():
        means = mean_by_comparison(places).items()
        lines += [
            f"| {title} | mean cosine |",
            "|---|---|",
            *(f"| {name} | {value:+.3f} |" for name, value in means),
            "",
            *([f"Models from the hub: {commits_said(commits[title])}.", ""] if commits[title] else []),
        ]
    text = "\n".join(lines)
    write_text(asked.page, text)
    rows = [
        {"pair": title.partition(": ")[2], **asdict(place), "commits": commits[title]}
        for title, places in found.items()
        for place in places
    ]
    write_json(asked.page.with_suffix(".json"), rows)
    yield text
    yield f"{asked.page}, .png, .svg and .json beside it"


ABOUT = """Cosine between what the small model's and the large model's own LoRA add to each weight (B A). The small one
is carried to the large model's width by orthogonal maps fitted to both models' states on 256 training rows, its
layers spread evenly; a random plug is the control, the large model's LoRA of another seed what likeness to expect at
most. The paper reports "up to 75 %" between GPT2-medium and GPT2-XL and does not say how modules of unequal shape were
compared."""
