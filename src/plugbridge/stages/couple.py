"""Coupling module, plug and Bridge."""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plugbridge.families.spec import Layout, layout_of_config
from plugbridge.files import folder_atomically, write_atomically, write_json
from plugbridge.markers import reading
from plugbridge.models import load_config
from plugbridge.prepare import Prepared
from plugbridge.shrink.packing import load_bridge
from plugbridge.stages.depends import alignment_passes, rate_of_training
from plugbridge.stages.work import (
    Work,
    bridge_folder,
    layouts,
    read_plan,
    schedule_of,
    train,
)
from plugbridge.tasks.encode import Encoded
from plugbridge.train import batch_indices, current_step, drawn
from plugbridge.transfer.cache import make_cache
from plugbridge.transfer.couple import Mode, find_mode
from plugbridge.transfer.coupling import (
    Coupling,
    bridge_state,
    drop_vocabulary,
    require_gradients,
    silence,
    without_bridge,
)
from plugbridge.transfer.down import start_down
from plugbridge.transfer.fidelity import Fidelity, WaysBack, fidelity
from plugbridge.transfer.ladder import length_in
from plugbridge.transfer.needed import needs_bridge
from plugbridge.transfer.start import Start, fresh_start, small_start
from plugbridge.transfer.states import BothRows, Place, See, States, watch
from plugbridge.tuners.module import Module, Slot, read, save, unpack

log = logging.getLogger(__name__)


def couple(work: Work) -> dict[str, Any]:
    """Train module, plug and Bridge together (Algorithm 1, lines 2 and 4 to 7)."""
    p = work.prepared
    settings = p.config.couple
    mode = find_mode(settings.mode)
    assert settings.layers is not None  # resolved
    small, large = layouts(work)
    through = needs_bridge(p.config)
    plan = (read_plan(work.root) if through else without_bridge(large)).to(p.device)
    start = _start(work, small, large)
    module = {slot: tensor.to(p.device, torch.float32) for slot, tensor in start.module.items()}
    streams = not settings.bridge_resident
    bridge = load_bridge(bridge_folder(work), device=p.device, streamed=streams) if through else None
    starts = settings.steps > 0 or through  # or the module is plugged in as it is
    down = start_down(settings.down, large, plan, p.method, module)
    coupling = Coupling(
        method=p.method, settings=p.settings, small=start.small, large=large, plan=plan, bridge=bridge,
        encoder=p.large_encoder, module=module,
        plug={key: tensor.to(p.device) for key, tensor in start.plug.items()},
        down={key: tensor.to(p.device) for key, tensor in down.items()},
        train_bridge=bridge is not None and mode.trains_bridge and settings.bridge == "train",
        large_model=p.load_run_only()[0] if mode.runs_large and starts else None,
        first={stack: count - math.ceil(settings.layers * count) for stack, count in large.layers.items()},
        recompute=settings.recompute or (mode.runs_large and p.streamed is not None and p.config.load_in is None),
        activations=settings.activations or "bridge", error_bound=settings.error_bound,
        kept_bits=settings.kept_bits,
        perturbation=settings.perturbation,
        cache=make_cache(settings.cache, work.folder) if mode.caches else None,
        micro_batch=settings.micro_batch,
    )  # fmt: skip
    if bridge is not None and not mode.reads_tokens:
        drop_vocabulary(bridge, large)
    silence(coupling)
    require_gradients(coupling)
    weights = {} if bridge is None else dict(bridge.named_parameters())
    started = coupling.parameters()  # before the mode puts peft's own module on the Bridge
    loss = mode.start(coupling) if starts else _no_loss
    climbed = {f"ladder/{key}": tensor for key, tensor in coupling.ladder.items()}
    gradients = settings.fidelity_rows > 0 and p.config.score.importance == "fisher"  # else none is ever taken
    compared = _Compared(work, coupling, loss) if gradients and isinstance(loss, WaysBack) else None
    if compared is not None:
        compared.start()
    parameters = {name: tensor for name, tensor in {**started, **climbed}.items() if tensor.requires_grad}
    rates = {
        "": rate_of_training(settings, p.method),
        "plug/": settings.plug_learning_rate,
        "down/": settings.plug_learning_rate,
        "ladder/": settings.plug_learning_rate,
        "bridge/": settings.bridge_learning_rate,
    }
    models = [model for model in (coupling.large_model, bridge) if model is not None]
    schedule = schedule_of(settings, p.config.seed, rates)
    if mode.exact:
        schedule = replace(schedule, micro_batch=None)  # its parts go through a block together
    rows, title = p.large_rows["train"], f"couple ({settings.mode})"
    losses = train(work, models, parameters, rows, loss if compared is None else compared, schedule, title)
    if compared is not None:
        compared.measure(settings.steps)
    _save_coupled(work, coupling, weights)
    write_json(work.folder / "losses.json", losses)
    return {
        "mode": settings.mode,
        "trainable": {
            part: sum(t.numel() for n, t in parameters.items() if n.startswith(f"{part}/"))
            for part in ("module", "plug", "down", "ladder", "bridge")
        },
        "large_rows": _rows_aligned(p) + _large_rows(p, mode, coupling.cache is not None),
        "cache_bytes": cached_bytes(p),
        "layer_map": start.layer_map,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "fidelity": [] if compared is None else compared.found,
        "still": sorted(coupling.still),
    }


class _Compared:
    """A loss that is compared with backpropagation before some steps; what was found is kept for a resumed stage."""

    def __init__(self, work: Work, coupling: Coupling, loss: WaysBack) -> None:
        p = work.prepared
        self.coupling, self.loss, self.seed = coupling, loss, p.config.seed
        self.every = p.config.couple.fidelity_every
        self.at_once = min(p.config.couple.batch_size, p.config.couple.micro_batch or p.config.couple.batch_size)
        self.rows = drawn(p.large_rows["train"], p.config.couple.fidelity_rows, p.config.seed)
        self.path = work.folder / "fidelity.json"
        kept: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
        self.found = kept

    def __call__(self, rows: list[Encoded]) -> Tensor:
        step = current_step(self.seed)
        if self.every and step % self.every == 0:
            self.measure(step)
        return self.loss(rows)

    def start(self) -> None:
        """Compare before the first step; a module whose gradient would lead it astray is to stay as it starts."""
        self.measure(0)
        for found in self.found[:1]:
            start = Fidelity(**found)
            wrong = start.wrong(self.coupling.first)
            if (advice := start.advice()) is not None:
                log.warning("%s", advice)
            if wrong:
                places = ", ".join(f"{stack} {layer}" for stack, layer in sorted(wrong))
                log.warning("fidelity is not above 0 in these layers, whose modules stay as they start: %s", places)
            self.coupling.still.update(wrong)
            require_gradients(self.coupling)

    def measure(self, step: int) -> None:
        """Compare before a step, unless that was done."""
        if any(each["step"] == step for each in self.found):
            return
        found = fidelity(self.coupling, self.loss, self.rows, step, self.at_once)
        if not all(map(math.isfinite, found.means())):
            return  # nor is the loss finite, which ends the training and is told
        log.info("step %d: %s", step, found.said())
        self.found.append(asdict(found))
        write_json(self.path, self.found)


def _no_loss(_rows: list[Encoded]) -> Tensor:
    raise AssertionError("a training without steps asks for no loss")


def rows_drawn(prepared: Prepared) -> list[Encoded]:
    """The rows that coupling reads, in order."""
    settings, rows = prepared.config.couple, prepared.large_rows["train"]
    return [
        rows[i]
        for step in range(settings.steps)
        for i in batch_indices(len(rows), step, settings.batch_size, prepared.config.seed)
    ]


def cached_bytes(prepared: Prepared) -> int:
    """Bytes of the large model's activations that a coupling keeps, however often it was resumed."""
    config, kind = prepared.config, prepared.large_encoder.kind
    places = find_mode(config.couple.mode).caches
    if config.couple.cache == "off" or places is None:
        return 0
    large = load_config(config.large_path, trust_remote_code=config.trust_remote_code)
    layout = layout_of_config(large.to_dict())
    stacks = [rung.partition(":")[0] for rung in places(layout)]
    positions = sum(length_in(row, stack, kind) for row in set(rows_drawn(prepared)) for stack in stacks)
    return positions * layout.sizes["hidden"] * prepared.dtype.itemsize


def _rows_aligned(prepared: Prepared) -> int:
    """Rows that both models read so that coupling can start from their states, as often as they are read."""
    samples = min(prepared.config.couple.align_samples, len(prepared.large_rows["train"]))
    return samples * alignment_passes(prepared.config)


def _large_rows(prepared: Prepared, mode: Mode, cached: bool) -> int:
    """Rows that the large model reads while coupling, as often as it does; a cached row is read once."""
    if not mode.runs_large:
        return 0
    drawn = rows_drawn(prepared)
    return len(set(drawn)) if cached else mode.passes * len(drawn)


def _start(work: Work, small: Layout, large: Layout) -> Start:
    """Module, plug and layer map to begin with; runs the two models only if the settings need their states."""
    p = work.prepared
    settings = p.config.couple
    torch.manual_seed(p.config.seed)
    assert settings.plug is not None  # resolved
    if settings.plug == "fresh":
        return fresh_start(p.method, p.settings, large, p.load_to_fit()[0])
    tuned = unpack(p.method, small, read(work.root / "tune" / "module"))
    rows = _rows_of_both(work) if alignment_passes(p.config) else None
    return small_start(p.method, settings.plug, settings.layer_map, small, large, tuned, rows, p.config.seed)


def _rows_of_both(work: Work) -> BothRows:
    """The rows that a start is fitted on, for both models; of the states only the small model's of one row are kept."""
    p = work.prepared
    encoder, rows = p.shared()
    chosen = drawn(rows["train"], p.config.couple.align_samples, p.config.seed)
    small, large = p.load(p.config.small), p.load_run_only()

    def run(narrow: Collection[Place], wide: Collection[Place]) -> Iterator[tuple[States, Callable[[See], None]]]:
        with work.progress.bar("states of both models", len(chosen)) as advance:
            for row in chosen:
                states: States = {}
                watch(*small, encoder, row, narrow, states.__setitem__)
                yield states, partial(watch, *large, encoder, row, wide)
                advance(1)

    return run


def _save_coupled(work: Work, coupling: Coupling, weights: Mapping[str, Tensor]) -> None:
    p = work.prepared
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in coupling.parameters().items()
        if not name.startswith("bridge/")
    }
    with write_atomically(work.folder / "coupled.safetensors") as path:
        save_file(tensors, str(path))
    if coupling.bridge is None or not find_mode(p.config.couple.mode).trains_bridge:
        return
    trained = load_bridge(bridge_folder(work))
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


def read_coupled(path: Path) -> tuple[Module, dict[str, Tensor], dict[str, Tensor]]:
    """Module, plug and ladder that coupling left."""
    module: Module = {}
    plug_maps: dict[str, Tensor] = {}
    ladder: dict[str, Tensor] = {}
    with reading(path):
        for name, tensor in load_file(str(path)).items():
            part, _, key = name.partition("/")
            if part == "module":
                stack, layer, site, leaf = key.split(":")
                module[Slot(stack, int(layer), site, leaf)] = tensor
            elif part == "plug":
                plug_maps[key] = tensor
            elif part == "ladder":
                ladder[key] = tensor
    return module, plug_maps, ladder
