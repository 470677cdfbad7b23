"""The stages of a run, and the only file that joins shrink, transfer and train.

`build_stages` gives the stages as `run.Stage`s; each is one function here. Stages meet only on disk.
"""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plugbridge.config import TrainConfig
from plugbridge.cost import measure
from plugbridge.errors import ModelError
from plugbridge.evaluate import log_likelihood, mean_loss, option_scores, predictions
from plugbridge.families.spec import Layout, family_of
from plugbridge.files import folder_atomically, write_atomically, write_json
from plugbridge.models import (
    load_config,
    load_model,
    parameter_count,
)
from plugbridge.prepare import Prepared, bridge_sizes
from plugbridge.progress import Progress
from plugbridge.run import Stage, StageResult, facts_of
from plugbridge.shrink.importance import (
    SecondMoments,
    activation,
    fisher,
    magnitude,
    record_second_moments,
    residual_energy,
)
from plugbridge.shrink.prune import BridgePlan, plan_bridge, principal_basis, prune_model
from plugbridge.tasks.encode import Encoded, Encoder, gold
from plugbridge.tasks.metrics import METRICS
from plugbridge.tasks.spec import Split, Task
from plugbridge.train import Schedule, fit
from plugbridge.transfer.couple import find_mode
from plugbridge.transfer.coupling import Coupling, bridge_state, require_gradients
from plugbridge.transfer.down import start_down
from plugbridge.transfer.fold import fold
from plugbridge.transfer.plug import duplicate, plug_shapes, random_plug, uniform_layer_map
from plugbridge.tuners.module import (
    Module,
    Slot,
    attach,
    load_state,
    read,
    save,
    state_of,
    trainable,
    unpack,
)
from plugbridge.tuners.table import Method

STAGES = ("tune", "score", "prune", "couple", "plug", "ceiling", "evaluate")
CHECKPOINT = "checkpoint.pt"
BASIS = "basis:"  # marks projections among the kept positions on disk


def schedule_of(train: TrainConfig, seed: int, rates: Mapping[str, float]) -> Schedule:
    """A training's numbers from its configuration."""
    return Schedule(
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rates=rates,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        clip=train.clip,
        checkpoint_every=train.checkpoint_every,
        seed=seed,
    )


def build_stages(prepared: Prepared, root: Path, progress: Progress) -> list[Stage]:
    """All stages of a run, in order, with what each depends on."""
    config = prepared.config
    common = {
        "seed": config.seed,
        "device": prepared.device,
        "dtype": config.dtype,
        "task": prepared.inputs["task"],
    }
    method = {
        "name": prepared.method.name,
        "rank": prepared.settings.rank,
        "alpha": prepared.settings.alpha,
        "dropout": prepared.settings.dropout,
    }
    small, large = prepared.inputs["small"], prepared.inputs["large"]

    def stage(
        name: str,
        needs: tuple[str, ...],
        depends: dict[str, Any],
        work: Callable[["Work"], dict[str, Any]],
    ) -> Stage:
        def measured(folder: Path) -> StageResult:
            gc.collect()
            with measure(prepared.device) as cost:
                facts = work(Work(prepared, root, folder, progress))
            return StageResult(facts, cost.seconds, cost.peak_bytes)

        return Stage(name, needs, {**common, **depends}, measured)

    tune_rate = _rate(config.tune, prepared.method)
    stages = [
        stage("tune", (), {"small": small, "method": method, "tune": _dump(config.tune), "rate": tune_rate}, tune),
        stage("score", (), {"large": large, "score": _dump(config.score)}, score),
        stage("prune", ("score",), {"large": large, "prune": _dump(config.prune)}, prune),
        stage(
            "couple",
            ("tune", "prune"),
            {"method": method, "couple": _dump(config.couple), "rate": _rate(config.couple, prepared.method)},
            couple,
        ),
        stage("plug", ("couple",), {"large": large, "source": config.large}, plug),
    ]
    results = ("tune", "prune", "couple", "plug")
    if config.ceiling is not None:
        depends = {
            "large": large,
            "method": method,
            "ceiling": _dump(config.ceiling),
            "rate": _rate(config.ceiling, prepared.method),
        }
        stages.append(stage("ceiling", (), depends, ceiling))
        results = (*results, "ceiling")
    stages.append(
        stage(
            "evaluate",
            results,
            {"small": small, "large": large, "evaluate": _dump(config.evaluate)},
            evaluate,
        )
    )
    return stages


def _dump(section: Any) -> dict[str, Any]:
    """A configuration section as JSON, without what does not change the result."""
    return {k: v for k, v in section.model_dump(mode="json").items() if k != "checkpoint_every"}


def _rate(train: TrainConfig, method: Method) -> float:
    return train.learning_rate if train.learning_rate is not None else method.learning_rate


@dataclass(frozen=True)
class Work:
    """What a stage's function gets: the prepared run, the run's root, its own folder."""

    prepared: Prepared
    root: Path
    folder: Path
    progress: Progress


def tune(work: Work) -> dict[str, Any]:
    """Tune the small model (Algorithm 1, line 1)."""
    p = work.prepared
    return _tune(work, p.config.small, p.config.tune, p.encoder, p.rows, "tune small")


def ceiling(work: Work) -> dict[str, Any]:
    """Tune the large model itself, with gradients: not part of the method, its upper reference."""
    p = work.prepared
    assert p.config.ceiling is not None
    return _tune(work, p.config.large, p.config.ceiling, p.large_encoder, p.large_rows, "tune large (ceiling)")


def _tune(
    work: Work,
    source: str,
    train: TrainConfig,
    encoder: Encoder,
    rows: Mapping[Split, list[Encoded]],
    title: str,
) -> dict[str, Any]:
    p = work.prepared
    model, layout = p.load(source)
    torch.manual_seed(p.config.seed)
    wrapped, config = attach(model, p.method, layout, p.settings)
    wrapped.train()
    rates = {"": _rate(train, p.method)}

    def loss(batch: list[Encoded]) -> Tensor:
        return mean_loss(wrapped, gold(encoder, batch).to(p.device), encoder.kind)

    parameters = trainable(wrapped)
    losses = fit(
        parameters, rows["train"], loss, schedule_of(train, p.config.seed, rates),
        work.folder / CHECKPOINT, work.progress, title,
    )  # fmt: skip
    with folder_atomically(work.folder / "module") as folder:
        save(folder, config, state_of(wrapped), source)
    wrapped.eval()
    validation = _accuracy(work, wrapped, encoder, rows["validation"], "validate")
    write_json(work.folder / "losses.json", losses)
    (work.folder / CHECKPOINT).unlink(missing_ok=True)
    return {
        "source": source,
        "rank": p.settings.rank,
        "trainable": sum(t.numel() for t in parameters.values()),
        "model_parameters": parameter_count(model) - sum(t.numel() for t in parameters.values()),
        "layers": layout.layers,
        "sizes": layout.sizes,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "validation": validation,
    }


def _metrics(task: Task, rows: list[Encoded], predicted: list[int]) -> dict[str, float]:
    right = [row.answer for row in rows]
    return {name: METRICS[name](predicted, right) for name in task.metrics}


def _accuracy(
    work: Work, model: torch.nn.Module, encoder: Encoder, rows: list[Encoded], title: str
) -> dict[str, float]:
    size = work.prepared.config.evaluate.batch_size
    scores = option_scores(model, encoder, rows, size, work.progress, title)
    return _metrics(work.prepared.task, rows, predictions(scores))


def score(work: Work) -> dict[str, Any]:
    """Score the large model's units and record its residual energy."""
    p = work.prepared
    model, layout = p.load(p.config.large)
    rows = p.large_rows["train"][: p.config.score.samples]
    kind = p.large_encoder.kind

    def likelihood(row: Encoded) -> Tensor:
        return log_likelihood(model, gold(p.large_encoder, [row]).to(p.device), kind).sum()

    total = len(rows) * (1 if p.config.score.importance == "magnitude" else 2)
    moments: SecondMoments | None = None
    with work.progress.bar(f"score large ({p.config.score.importance})", total) as advance:

        def counted() -> Any:
            for row in rows:
                yield row
                advance(1)

        if p.config.score.importance == "fisher":
            with record_second_moments(model, layout) as moments:
                scores = fisher(model, layout, counted(), likelihood)
        elif p.config.score.importance == "activation":
            scores = activation(model, layout, counted(), likelihood)
        else:
            scores = magnitude(model, layout)
        with record_second_moments(model, layout) as activity:
            energy = residual_energy(model, layout, counted(), likelihood)
    found = {"activity": activity.total("activity"), "error": moments.total("error") if moments else None}
    second = {kind: matrix for kind, matrix in found.items() if matrix is not None}
    for key, values in {**scores, **energy, **second}.items():
        if not bool(values.isfinite().all()):
            raise ModelError(f"the scores of '{key}' in {p.config.large} are not finite; is a weight of it NaN?")
    with write_atomically(work.folder / "scores.safetensors") as path:
        save_file(scores, str(path))
    with write_atomically(work.folder / "energy.safetensors") as path:
        save_file(energy, str(path))
    with write_atomically(work.folder / "moments.safetensors") as path:
        save_file(second, str(path))
    return {
        "samples": len(rows),
        "importance": p.config.score.importance,
        "gradients_of_large": p.config.score.importance == "fisher",
    }


def prune(work: Work) -> dict[str, Any]:
    """Prune the large model into the Bridge (Algorithm 1, line 3)."""
    p = work.prepared
    model, layout = p.load(p.config.large)
    scores = load_file(str(work.root / "score" / "scores.safetensors"))
    energy = load_file(str(work.root / "score" / "energy.safetensors"))
    whole = parameter_count(model)
    plan = plan_bridge(layout, scores, bridge_sizes(p.config.prune, model, layout))
    if p.config.prune.channels != "select":
        plan = replace(plan, basis={"hidden": _basis(work, plan.sizes["hidden"])})
    bridge = prune_model(model, layout, plan, energy)
    with folder_atomically(work.folder / "bridge") as folder:
        bridge.save_pretrained(str(folder))
        p.large_encoder.tokenizer.save_pretrained(str(folder))
    with write_atomically(work.folder / "keep.safetensors") as path:
        save_file({**plan.keep, **{f"{BASIS}{key}": matrix for key, matrix in plan.basis.items()}}, str(path))
    write_json(work.folder / "sizes.json", plan.sizes)
    count = parameter_count(bridge)
    blocks = sum(t.numel() for n, t in bridge.named_parameters() if layout.table()[n].place.stack is not None)
    return {
        "large_parameters": whole,
        "bridge_parameters": count,
        "bridge_block_parameters": blocks,
        "bridge_share": count / whole,
        "sizes": plan.sizes,
        "large_sizes": layout.sizes,
        "reduction_of_axes": {a: layout.sizes[a] / plan.sizes[a] for a in layout.family.scope},
    }


def _basis(work: Work, size: int) -> Tensor:
    """Principal directions of the residual stream, as the configuration weighs them. Returns (size, hidden)."""
    moments = load_file(str(work.root / "score" / "moments.safetensors"))
    kinds = ("activity", "error") if work.prepared.config.prune.channels == "gradient_pca" else ("activity",)
    return principal_basis(torch.stack([moments[kind] / moments[kind].trace() for kind in kinds]).sum(0), size)


def _read_plan(root: Path) -> BridgePlan:
    sizes: dict[str, int] = json.loads((root / "prune" / "sizes.json").read_text(encoding="utf-8"))
    tensors = load_file(str(root / "prune" / "keep.safetensors"))
    keep = {key: tensor for key, tensor in tensors.items() if not key.startswith(BASIS)}
    basis = {key.removeprefix(BASIS): tensor for key, tensor in tensors.items() if key.startswith(BASIS)}
    return BridgePlan(sizes, keep, basis)


def _layouts(work: Work) -> tuple[Layout, Layout]:
    """Small and large layouts, from what earlier stages recorded; loads no model."""
    family = family_of(load_config(work.prepared.config.large).model_type)
    small = facts_of(work.root, "tune")
    plan = facts_of(work.root, "prune")
    large_layers = _layer_counts(work)
    return Layout(family, small["sizes"], small["layers"]), Layout(family, plan["large_sizes"], large_layers)


def _layer_counts(work: Work) -> dict[str, int]:
    config = load_config(work.prepared.config.large)
    family = family_of(config.model_type)
    return {name: int(getattr(config, stack.layers)) for name, stack in family.stack.items()}


def couple(work: Work) -> dict[str, Any]:
    """Train module, plug and Bridge together (Algorithm 1, lines 2 and 4 to 7)."""
    p = work.prepared
    settings = p.config.couple
    mode = find_mode(settings.mode)
    small, large = _layouts(work)
    plan = _read_plan(work.root)
    module = duplicate(unpack(p.method, small, read(work.root / "tune" / "module")), uniform_layer_map(small, large))
    module = {slot: tensor.to(p.device, torch.float32) for slot, tensor in module.items()}
    bridge = load_model(str(work.root / "prune" / "bridge"), dtype=torch.float32, device=p.device)
    generator = torch.Generator().manual_seed(p.config.seed)
    plug_maps = random_plug(plug_shapes(p.method, small, large, module), generator)
    down = start_down(settings.down, large, plan, p.method, module)
    coupling = Coupling(
        method=p.method, settings=p.settings, small=small, large=large, plan=plan, bridge=bridge,
        encoder=p.large_encoder, module=module,
        plug={key: tensor.to(p.device) for key, tensor in plug_maps.items()},
        down={key: tensor.to(p.device) for key, tensor in down.items()},
        train_bridge=mode.trains_bridge and settings.bridge == "train",
        large_model=p.load(p.config.large)[0] if mode.runs_large else None,
    )  # fmt: skip
    require_gradients(coupling)
    parameters = coupling.parameters()
    weights = dict(bridge.named_parameters())
    loss = mode.start(coupling)
    rates = {
        "": _rate(settings, p.method),
        "plug/": settings.plug_learning_rate,
        "down/": settings.plug_learning_rate,
        "bridge/": settings.bridge_learning_rate,
    }
    losses = fit(
        parameters, p.large_rows["train"], loss, schedule_of(settings, p.config.seed, rates),
        work.folder / CHECKPOINT, work.progress, f"couple ({settings.mode})",
    )  # fmt: skip
    _save_coupled(work, coupling, weights)
    write_json(work.folder / "losses.json", losses)
    (work.folder / CHECKPOINT).unlink(missing_ok=True)
    return {
        "mode": settings.mode,
        "trainable": {
            part: sum(t.numel() for n, t in parameters.items() if n.startswith(f"{part}/"))
            for part in ("module", "plug", "down", "bridge")
        },
        "layer_map": uniform_layer_map(small, large),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _save_coupled(work: Work, coupling: Coupling, weights: Mapping[str, Tensor]) -> None:
    p = work.prepared
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in coupling.parameters().items()
        if not name.startswith("bridge/")
    }
    with write_atomically(work.folder / "coupled.safetensors") as path:
        save_file(tensors, str(path))
    if not find_mode(p.config.couple.mode).trains_bridge:
        return
    source = work.root / "prune" / "bridge"
    trained = load_model(str(source), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(weights[name])
    with folder_atomically(work.folder / "bridge") as folder:
        trained.save_pretrained(str(folder))
        p.large_encoder.tokenizer.save_pretrained(str(folder))
    layout = coupling.bridge_layout()
    config = p.method.configure(layout, p.method.roles, p.settings)
    with folder_atomically(work.folder / "bridge_module") as folder:
        save(folder, config, bridge_state(coupling), "../bridge")  # a run may be moved


def _read_coupled(path: Path) -> tuple[Module, dict[str, Tensor]]:
    module: Module = {}
    plug_maps: dict[str, Tensor] = {}
    for name, tensor in load_file(str(path)).items():
        part, _, key = name.partition("/")
        if part == "module":
            stack, layer, site, leaf = key.split(":")
            module[Slot(stack, int(layer), site, leaf)] = tensor
        elif part == "plug":
            plug_maps[key] = tensor
    return module, plug_maps


def plug(work: Work) -> dict[str, Any]:
    """Fold module and plug into a checkpoint of the large model (Algorithm 1, line 8)."""
    p = work.prepared
    small, large = _layouts(work)
    module, plug_maps = _read_coupled(work.root / "couple" / "coupled.safetensors")
    state = fold(p.method, small, large, plug_maps, module)
    config = p.method.configure(large, p.method.roles, p.settings)
    with folder_atomically(work.folder / "checkpoint") as folder:
        save(folder, config, state, p.config.large)
    return {"changed": sum(t.numel() for t in state.values()), "tensors": len(state)}


def evaluate(work: Work) -> dict[str, Any]:
    """Score every model of the run on the test rows (or, while choosing, the validation rows)."""
    p = work.prepared
    config = p.config.evaluate
    plans: list[tuple[str, str, Path | None, Encoder, Mapping[Split, list[Encoded]]]] = [
        ("small_tuned", p.config.small, work.root / "tune" / "module", p.encoder, p.rows),
        ("large_zero_shot", p.config.large, None, p.large_encoder, p.large_rows),
        ("large_plugged", p.config.large, work.root / "plug" / "checkpoint", p.large_encoder, p.large_rows),
    ]  # fmt: skip
    if find_mode(p.config.couple.mode).trains_bridge:
        couple_folder = work.root / "couple"
        source, module = str(couple_folder / "bridge"), couple_folder / "bridge_module"
        plans.append(("bridge_coupled", source, module, p.large_encoder, p.large_rows))
    if p.config.ceiling is not None:
        plans.append(("large_tuned", p.config.large, work.root / "ceiling" / "module", p.large_encoder, p.large_rows))
    facts: dict[str, Any] = {}
    for name, source, module, encoder, rows in plans:
        chosen = rows[config.split][: config.limit]
        gc.collect()
        with measure(p.device) as cost:
            model, layout = p.load(source)
            if module is not None:
                wrapped, _ = attach(model, p.method, layout, p.settings)
                load_state(wrapped, read(module))
                scored: torch.nn.Module = wrapped.eval()
            else:
                scored = model
            scores = option_scores(scored, encoder, chosen, config.batch_size, work.progress, f"evaluate {name}")
        predicted = predictions(scores)
        facts[name] = {
            "metrics": _metrics(p.task, chosen, predicted),
            "n": len(chosen),
            "seconds": cost.seconds,
            "peak_bytes": cost.peak_bytes,
        }
        lines = (
            json.dumps({"prediction": answer, "right": row.answer, "scores": values})
            for answer, row, values in zip(predicted, chosen, scores, strict=True)
        )
        with write_atomically(work.folder / "predictions" / f"{name}.jsonl") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    right = [row.answer for row in p.large_rows[config.split][: config.limit]]
    common = max(set(right), key=right.count)
    facts["majority"] = {"metrics": {name: METRICS[name]([common] * len(right), right) for name in p.task.metrics}}
    return facts
