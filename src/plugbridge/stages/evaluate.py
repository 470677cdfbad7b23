"""Scoring every model of a run."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from plugbridge.cost import Cost, measure, settle
from plugbridge.families.spec import Layout
from plugbridge.models import parameter_count
from plugbridge.probe import MOST, fit_option_probe, fit_probe, option_states, prompt_states
from plugbridge.shrink.packing import load_bridge
from plugbridge.stages.baselines import Subject, load_finetuned, load_ladder, subject_of
from plugbridge.stages.couple import read_coupled
from plugbridge.stages.depends import baselines_of, model_names
from plugbridge.stages.predictions import write_predictions
from plugbridge.stages.work import Work, answers_of, layouts, read_plan, source_of
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.metrics import UNITS, Answer, chosen, majority, metrics_of
from plugbridge.tasks.rows import TEST_SEED
from plugbridge.tasks.spec import Split, Task
from plugbridge.train import drawn
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.ladder import LadderNetwork
from plugbridge.transfer.proxy import ProxyTuned
from plugbridge.tuners.module import attach, load_state, read

T = TypeVar("T")

SIZES: tuple[Literal["small", "large"], ...] = ("small", "large")


@dataclass(frozen=True)
class Candidate:
    """One model to score: how to load it, and the rows as its encoder gave them."""

    name: str
    load: Callable[[], torch.nn.Module]
    encoder: Encoder
    rows: Mapping[Split, list[Encoded]]


def evaluate(work: Work) -> dict[str, Any]:
    """Score every model of the run on the test rows (or, while choosing, the validation rows)."""
    p = work.prepared
    config = p.config.evaluate
    facts: dict[str, Any] = {}
    if not work.cost.cuda:  # what is given back here has to be taken again
        work.cost.baseline = min(work.cost.baseline, settle())
    for candidate in candidates(work):
        if config.models is not None and candidate.name not in config.models:
            continue
        name, encoder = candidate.name, candidate.encoder
        chosen_rows = limited(p.task, candidate.rows[config.split], config.limit)
        settle()
        with measure(p.device, work.cost.baseline, work.cost) as cost:
            model = candidate.load()
            answers = answers_of(p, model, encoder, chosen_rows, work.progress, f"evaluate {name}")
            del model
        facts[name] = _note(work, name, answers, cost)
    for size in SIZES:
        name = f"{size}_probe"
        if config.probe and (config.models is None or name in config.models):
            subject = subject_of(work, size)
            rows = limited(p.task, subject.rows[config.split], config.limit)
            with measure(p.device, work.cost.baseline, work.cost) as cost:
                predicted = _probe(work, subject, rows)
            answers = [chosen(source_of(row), choice) for row, choice in zip(rows, predicted, strict=True)]
            facts[name] = _note(work, name, answers, cost)
    right = [source_of(row) for row in limited(p.task, p.large_rows[config.split], config.limit)]
    common = majority(p.task.form(p.large_encoder.kind), right)
    facts["cut"], facts["remarks"] = p.cut(), list(p.said)
    facts["majority"] = {"metrics": metrics_of(p.task.metrics, common)}
    facts["models"] = {size: _described(work, subject_of(work, size).source) for size in SIZES}
    return facts


def _described(work: Work, source: str) -> dict[str, Any]:
    """Where a model was, and how many parameters it has."""
    return {"source": source, "parameters": parameter_count(work.prepared.without_weights[source][0])}


def limited(task: Task, rows: Sequence[Encoded], limit: int | None) -> list[Encoded]:
    """So many of the rows, in their own order, the same ones in every run, so that runs compare.

    Rows that one of the task's metrics judges together (`UNITS`) stay together: there may be a few less, or more where
    the first such group is larger than the limit.
    """
    unit = next((UNITS[name] for name in task.metrics if name in UNITS), None)
    if unit is None or limit is None:
        return [rows[i] for i in sorted(drawn(range(len(rows)), limit, TEST_SEED))]
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[unit(source_of(row))].append(i)
    taken: list[int] = []
    for places in drawn(list(groups.values()), None, TEST_SEED):
        if taken and len(taken) + len(places) > limit:
            break
        taken += places
    return [rows[i] for i in sorted(taken)]


def _note(work: Work, name: str, answers: list[Answer], cost: Cost) -> dict[str, Any]:
    """A model's facts; its predictions go into a file."""
    form = work.prepared.task.form(work.prepared.encoder.kind)
    write_predictions(work.folder / "predictions" / f"{name}.jsonl", work.prepared.task, form, answers)
    metrics = metrics_of(work.prepared.task.metrics, answers)
    return {"metrics": metrics, "n": len(answers), "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}


def _probe(work: Work, subject: Subject, chosen: list[Encoded]) -> list[int]:
    """Answers of a linear probe: fitted on the training rows, its penalty chosen on the validation rows."""
    p, size = work.prepared, work.prepared.config.evaluate.batch_size
    model, layout = p.load_run_only() if subject.size == "large" else p.load(subject.source)
    every = subject.rows["train"]
    train = [every[i] for i in sorted(drawn(range(len(every)), MOST, p.config.seed))]
    parts = {"train": train, "validation": subject.rows["validation"], "chosen": chosen}
    head, encoder = layout.family.head, subject.encoder

    def read(states: Callable[..., T]) -> dict[str, T]:
        common = {"batch_size": size, "progress": work.progress}
        return {n: states(model, head, encoder, rows, **common, title=f"probe {n}") for n, rows in parts.items()}

    if p.task.form(encoder.kind).same_options:
        return fit_probe(read(prompt_states), {n: [row.answer for row in rows] for n, rows in parts.items()})
    right = {n: [{row.answer, *source_of(row).also} for row in rows] for n, rows in parts.items()}
    return fit_option_probe(read(option_states), right)


def candidates(work: Work) -> list[Candidate]:
    """The models of a run, in the order of its report."""
    p, root = work.prepared, work.root
    small, large = (p.encoder, p.rows), (p.large_encoder, p.large_rows)
    climbs = find_mode(p.config.couple.mode).runs_large
    tuned = root / "ceiling" / "module"  # of the weights it was tuned with
    known = {
        "small_zero_shot": (lambda: p.load(p.config.small)[0], *small),
        "small_tuned": (lambda: with_module(work, p.load(p.config.small), root / "tune" / "module"), *small),
        "large_zero_shot": (lambda: p.load_run_only()[0], *large),
        "large_proxy": (lambda: _proxy_tuned(work), *p.shared()),
        "large_plugged": (lambda: with_module(work, p.load_run_only(), root / "plug" / "checkpoint"), *large),
        "bridge_coupled": (lambda: _coupled_bridge(work, climbs), *large),
        "large_tuned": (lambda: with_module(work, p.load_large(), tuned), *large),
    }
    for name, size, kind, _ in baselines_of(p.config):
        subject = subject_of(work, size)
        load = partial(load_finetuned, work, name) if kind == "finetuned" else partial(load_ladder, work, name, size)
        known[name] = (load, subject.encoder, subject.rows)
    return [Candidate(name, *known[name]) for name in model_names(p.config)]


def _proxy_tuned(work: Work) -> torch.nn.Module:
    """The large model beside the tuned small one."""
    p = work.prepared
    small = with_module(work, p.load(p.config.small), work.root / "tune" / "module")
    return ProxyTuned(p.load_run_only()[0], small).eval()


def with_module(work: Work, loaded: tuple[PreTrainedModel, Layout], module: Path) -> PeftModel:
    """A model with a checkpoint's module on it."""
    p = work.prepared
    model, layout = loaded
    wrapped, _ = attach(model, p.method, layout, p.settings)
    load_state(wrapped, read(module))
    return wrapped.eval()


def _coupled_bridge(work: Work, climbs: bool) -> torch.nn.Module:
    """The Bridge as coupling left it, with the ladder from the large model where it has one."""
    p, folder = work.prepared, work.root / "couple"
    bridge = load_bridge(folder / "bridge", p.dtype, p.device)
    narrow = replace(layouts(work)[1], sizes=read_plan(work.root).sizes)
    wrapped, _ = attach(bridge, p.method, narrow, p.settings)
    load_state(wrapped, read(folder / "bridge_module"))
    if not climbs:
        return wrapped.eval()
    large, layout = p.load_run_only()
    _, _, ladder = read_coupled(folder / "coupled.safetensors")
    on_device = {name: tensor.to(p.device) for name, tensor in ladder.items()}
    return LadderNetwork(large, layout, bridge, wrapped, on_device).eval()
