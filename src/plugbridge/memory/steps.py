"""One step of everything a run does, on a model of a given shape: built of the library's own functions.

A step can be run for real or with fake tensors. Each is a function of a `Case` that makes what the stage keeps in
memory and returns what is then done again and again.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plugbridge.evaluate import mean_loss
from plugbridge.families.spec import Layout
from plugbridge.memory.case import MADE_UP, TARGETS, Case, scored
from plugbridge.memory.packed import pack_weights
from plugbridge.models import checkpoint_activations, find_checkpoint, last_positions
from plugbridge.progress import Silent
from plugbridge.quantised import load_quantised
from plugbridge.shrink.bridge import bridge_config, bridge_weights
from plugbridge.shrink.packing import make_packed, matrices_of, packed_weights
from plugbridge.shrink.prune import BridgePlan, plan_bridge, principal_basis, unit_sum
from plugbridge.shrink.shelf import Place, Shelf
from plugbridge.stages.shrink import units_of
from plugbridge.streaming import fill_buffers
from plugbridge.tasks.encode import Encoded, gold
from plugbridge.train import make_optimizer, shares
from plugbridge.transfer.backprop import exact_loss
from plugbridge.transfer.couple import MODES, find_mode
from plugbridge.transfer.coupling import Coupling, drop_vocabulary, require_gradients, silence, without_bridge
from plugbridge.transfer.down import start_down
from plugbridge.transfer.fold import fold
from plugbridge.transfer.ladder import LadderNetwork, start_ladder
from plugbridge.transfer.plug import duplicate, plug_shapes, uniform_layer_map
from plugbridge.transfer.proxy import ProxyTuned
from plugbridge.transfer.repair import repair_loss, repaired_parameters
from plugbridge.transfer.start import LayerLikeness, MapKind, PlugFit, Start, StartKind
from plugbridge.transfer.states import States, watch
from plugbridge.tuners.module import Module, attach, pack, saved_key, trainable, unpack

MakeStep = Callable[[Case], "Step"]
Marks = list[tuple[nn.Module, str]]


@dataclass(frozen=True)
class Step:
    """A step that is ready: `work` is done again and again.

    `phases` are the parts of the work in their order. `marks` are the models whose sublayers are places of their own,
    `trained` the parameters that train. `rows` is how many rows the work reads; `chosen` how many positions a mask in
    it chooses. `begin` makes the optimizer's state, which the first time of a training step would make.
    """

    phases: dict[str, Callable[[], None]]
    marks: Marks
    rows: int
    trained: int = 0
    chosen: int | None = None
    held: list[object] = field(default_factory=list[object])
    begin: Callable[[], None] = lambda: None

    def work(self) -> None:
        """All phases once."""
        for phase in self.phases.values():
            phase()


def training(
    case: Case,
    parameters: Iterable[Tensor],
    loss: Callable[[list[Encoded]], Tensor],
    marks: Marks,
    held: list[object],
) -> Step:
    """A step of the library's training loop (`train.fit`): loss and backward part by part, clipped, updated."""
    tensors = list(parameters)
    optimizer = make_optimizer(case.optimizer, [{"params": [tensor], "lr": 1e-4} for tensor in tensors], 0.0)
    kept: list[Tensor] = []

    def forward(part: list[Encoded], share: float, first: bool) -> None:
        if first and not case.later:
            optimizer.zero_grad(set_to_none=True)
        kept.append(loss(part) * share)

    def backward() -> None:
        kept.pop().backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()

    def begin() -> None:
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        if not case.later:
            optimizer.zero_grad(set_to_none=True)

    phases: dict[str, Callable[[], None]] = {}
    for i, (part, share) in enumerate(shares(case.rows(), case.micro_batch, lambda row: row.weight)):
        number = f" {i + 1}" if i > 0 else ""
        phases[f"forward{number}"] = partial(forward, part, share, i == 0)
        phases[f"backward{number}"] = backward
    phases["update"] = update
    chosen = (case.micro_batch or case.batch) * TARGETS[case.kind]
    return Step(phases, marks, case.batch, sum(tensor.numel() for tensor in tensors), chosen, held, begin)


def training_together(
    case: Case,
    parameters: Iterable[Tensor],
    loss: Callable[[list[Encoded]], Tensor],
    marks: Marks,
    held: list[object],
) -> Step:
    """A step whose parts its loss takes through every block together, gradients included."""
    step = training(replace(case, micro_batch=None), parameters, loss, marks, held)
    return replace(step, chosen=(case.micro_batch or case.batch) * TARGETS[case.kind])


def _loss(case: Case, forward: nn.Module) -> Callable[[list[Encoded]], Tensor]:
    return lambda rows: mean_loss(forward, gold(case.encoder, rows).to(case.device), case.kind)


def finetune(case: Case) -> Step:
    """All weights train."""
    model, _ = case.build()
    model.train()
    return training(case, model.parameters(), _loss(case, model), [(model, "model")], [model])


def tune(case: Case, checkpointing: bool = False) -> Step:
    """A module trains by backpropagation through the model."""
    model, layout = load(case)
    wrapped, _ = attach(model, case.method, layout, case.settings)
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    wrapped.train()
    tensors = trainable(wrapped).values()
    return training(case, tensors, _loss(case, wrapped), [(model, "model")], [wrapped])


def tune_checkpointed(case: Case) -> Step:
    """A module trains by backpropagation, activations computed anew in the backward pass."""
    return tune(case, checkpointing=True)


def tune_by_blocks(case: Case) -> Step:
    """A module trains by exact gradients, the model's blocks one after another: in memory, or read for it from disk."""
    model, layout = load(case)
    wrapped, _ = attach(model, case.method, layout, case.settings)
    wrapped.train()
    own = {saved_key(name): tensor.detach().clone().requires_grad_(True) for name, tensor in trainable(wrapped).items()}
    loss = exact_loss(
        wrapped, case.method, layout, case.encoder, lambda: unpack(case.method, layout, own),
        micro_batch=case.micro_batch,
    )  # fmt: skip
    return training_together(case, own.values(), loss, [(model, "model")], [wrapped])


def ladder_side_tuning(case: Case) -> Step:
    """A side network trains beside the model, which runs forward only."""
    model, layout = run_only(case)
    side, plan = bridge_of(case, model, layout, case.dtype)
    side.requires_grad_(True).train()
    ladder = {key: tensor.to(case.device).requires_grad_(True) for key, tensor in start_ladder(layout, plan).items()}
    network = LadderNetwork(model, layout, side, side, ladder)
    tensors = [*side.parameters(), *ladder.values()]
    marks: Marks = [(model, "model"), (side, "side")]
    return training(case, tensors, _loss(case, network), marks, [network])


def bridge_of(
    case: Case, model: PreTrainedModel, layout: Layout, dtype: torch.dtype
) -> tuple[PreTrainedModel, BridgePlan]:
    """A Bridge with random weights, as one read from disk."""
    plan = case.plan(layout).to(case.device)
    with torch.device("meta" if case.packed != 16 or case.bridge_streamed else case.device):
        bridge: Any = type(model)(bridge_config(model.config, layout, plan))
    bridge = bridge.to(dtype).eval()
    if case.packed != 16:
        make_packed(bridge, matrices_of(bridge, layout), case.packed, "out in")
    if case.bridge_streamed:
        case.stream(bridge, layout)
    elif case.packed != 16:
        fill_buffers(bridge, case.device)
        for name, parameter in list(bridge.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            value = MADE_UP.get(leaf, 0)
            made = torch.full(parameter.shape, value, dtype=parameter.dtype, device=case.device)
            setattr(bridge.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    return bridge, plan


class Nowhere(Shelf):
    """A shelf for traces: what is put away is gone, and comes back as zeros."""

    def _write(self, place: Place, tensor: Tensor) -> None:
        return None

    def _read(self, place: Place) -> Tensor:
        return torch.zeros(place.shape, dtype=place.dtype, device=place.device)


def score(case: Case) -> Step:
    """Units are ranked, a row at a time; a streamed model reads as many rows at once as the case says, and one more.

    The second row finds the sums of the first.
    """
    model, layout = case.build()
    rows = case.rows(1 + max(1, case.at_once) if case.streamed else 2)
    shelves = Nowhere if case.weights is None else Shelf

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            shelf = shelves(Path(folder) / "states.bin") if case.streamed and case.at_once == 0 else None
            at_once = case.at_once if case.streamed else None
            units_of(model, layout, case.encoder, rows, case.importance, Silent(), shelf, at_once)

    marks: Marks = [(model, "model")]
    return Step({"score": work}, marks, 2 * len(rows), chosen=TARGETS[case.kind], held=[model])


def prune(case: Case) -> Step:
    """The Bridge is made."""
    model, layout = case.build()
    sizes = case.plan(layout).sizes

    def work() -> None:
        scores = {key: torch.ones(size, dtype=torch.double) for key, size in scored(layout).items()}
        energy = {norm: torch.ones(layout.sizes["hidden"], dtype=torch.double) for norm in layout.norms()}
        plan = plan_bridge(layout, scores, sizes)
        if case.channels != "select":
            hidden = layout.sizes["hidden"]
            kinds = 2 if case.channels == "gradient_pca" else 1
            moments = unit_sum(torch.eye(hidden, dtype=torch.double) for _ in range(kinds))
            plan = BridgePlan(plan.sizes, plan.keep, {"hidden": principal_basis(moments, sizes["hidden"])})
            del moments
        weights = bridge_weights(model, layout, plan, energy)
        if case.packed != 16:
            turned = layout.family.linear == "in out"
            weights = packed_weights(weights, matrices_of(model, layout), case.packed, turned)
        for _ in weights:  # each goes to disk
            pass

    return Step({"prune": work}, [], 0, held=[model])


def load(case: Case) -> tuple[PreTrainedModel, Layout]:
    """The model in as many bits as the case says: quantised as its files are read, or a stand-in without files."""
    if case.bits is None:
        return case.build()
    if case.weights is None:
        model, layout = case.build()
        pack_weights(model, layout, case.bits)
        return model, layout
    checkpoint = find_checkpoint(case.weights)
    return load_quantised(case.weights, case.bits, dtype=case.dtype, device=case.device, checkpoint=checkpoint)


def run_only(case: Case) -> tuple[PreTrainedModel, Layout]:
    """The model as it is loaded where it only runs forward."""
    model, layout = load(case)
    return model.requires_grad_(False), layout


def repair(case: Case) -> Step:
    """The Bridge's sublayers learn to answer as the large model's, or the Bridge to predict as it does."""
    model, layout = run_only(case)
    bridge, plan = bridge_of(case, model, layout, torch.float32)
    tensors = repaired_parameters(bridge, layout, case.target)
    bridge.requires_grad_(False)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    loss = repair_loss(case.target, model, layout, bridge, plan, case.encoder)
    marks: Marks = [(model, "model"), (bridge, "bridge")]
    step = training(case, tensors.values(), loss, marks, [model, bridge])
    return replace(step, chosen=None)


def couple(case: Case, mode_name: str) -> Step:
    """Module, plug and Bridge train together."""
    mode = find_mode(mode_name)
    spare, layout = case.on_meta()  # a mode that does not run the large model never makes it
    bridge, plan = None, without_bridge(layout).to(case.device)
    if mode.has_bridge:
        bridge, plan = bridge_of(case, spare, layout, torch.float32)
    start = _start(case, spare, layout)
    model = run_only(case)[0] if mode.runs_large else None
    down = start_down(case.down, layout, plan, case.method, start.module)
    coupling = Coupling(
        method=case.method, settings=case.settings, small=start.small, large=layout, plan=plan, bridge=bridge,
        encoder=case.encoder, module=start.module, plug=start.plug, down=down,
        train_bridge=mode.trains_bridge and case.train_bridge,
        large_model=model, activations=case.activations, kept_bits=case.kept_bits,
        recompute=case.recompute or (mode.runs_large and case.streamed),
        first={stack: count - case.trained.get(stack, count) for stack, count in layout.layers.items()},
        micro_batch=case.micro_batch,
    )  # fmt: skip
    if bridge is not None and not mode.reads_tokens:
        drop_vocabulary(bridge, layout)
    silence(coupling)
    require_gradients(coupling)
    started = coupling.parameters()
    loss = mode.start(coupling)
    climbed = {f"ladder/{key}": tensor for key, tensor in coupling.ladder.items()}
    tensors = [tensor for tensor in {**started, **climbed}.values() if tensor.requires_grad]
    marks: Marks = [] if bridge is None else [(bridge, "bridge")]
    if coupling.large_model is not None:
        marks.append((coupling.large_model, "model"))
    return (training_together if mode.exact else training)(case, tensors, loss, marks, [coupling])


def _start(case: Case, spare: PreTrainedModel, layout: Layout) -> Start:
    """Module and plug of the right shapes; their values do not matter."""
    if case.small is None:
        return Start(_fresh_module(case, spare, layout), {}, layout, {})
    empty, small = replace(case, config=case.small).on_meta()
    layers = uniform_layer_map(small, layout)
    module = duplicate(_fresh_module(case, empty, small), layers)
    shapes = plug_shapes(case.method, small, layout, module)
    return Start(module, {k: torch.full(shape, 0.01, device=case.device) for k, shape in shapes.items()}, small, layers)


def _fresh_module(case: Case, empty: PreTrainedModel, layout: Layout) -> Module:
    """A module of the shapes that a fresh one has."""
    wrapped, _ = attach(empty, case.method, layout, case.settings)
    shapes = {saved_key(name): parameter.shape for name, parameter in trainable(wrapped).items()}
    state = {name: torch.full(shape, 0.01, device=case.device) for name, shape in shapes.items()}
    return unpack(case.method, layout, state)


def align(case: Case, plug: StartKind, layer_map: MapKind) -> Step:
    """Both models read a row; what a start is fitted to is summed up, and fitted."""
    model, layout = run_only(case)
    assert case.small is not None
    small, narrow = replace(case, config=case.small, streamed=False, bits=None).build()
    layers = uniform_layer_map(narrow, layout)
    module = duplicate(_fresh_module(case, replace(case, config=case.small).on_meta()[0], narrow), layers)
    fit = PlugFit(case.method, narrow, layout, module, layers) if plug != "random" else None
    likeness = LayerLikeness(narrow, layout) if layer_map == "cka" else None
    (row,) = case.rows(1)

    def read() -> None:
        for sums in (fit, likeness):
            if sums is not None:
                places = sums.places
                states: States = {}
                watch(small, narrow, case.encoder, row, places[0], states.__setitem__)
                sums.add(states, partial(watch, model, layout, case.encoder, row, places[1]))

    def end() -> None:
        if fit is not None:
            fit.plug(plug)

    passes = (fit is not None) + (likeness is not None)
    return Step({"read": read, "fit": end}, [(model, "model")], passes, chosen=None, held=[model, small, fit, likeness])


def alignment(plug: StartKind, layer_map: MapKind) -> str:
    """The name of the step that fits such a start."""
    return f"align, {plug}, {layer_map}"


def alignments() -> dict[str, MakeStep]:
    """A step of every start that is fitted to states, by name."""
    ways: list[tuple[StartKind, MapKind]] = [
        ("random", "cka"),
        ("ridge", "uniform"),
        ("ridge", "cka"),
        ("procrustes", "uniform"),
        ("procrustes", "cka"),
    ]
    return {alignment(plug, layer_map): partial(align, plug=plug, layer_map=layer_map) for plug, layer_map in ways}


def plug(case: Case) -> Step:
    """Module and plug are folded into a checkpoint of the model; its entries count as trained."""
    spare, layout = case.on_meta()
    start = _start(case, spare, layout)

    def checkpoint() -> dict[str, Tensor]:
        folded = unpack(case.method, layout, fold(case.method, start.small, layout, start.plug, start.module))
        return pack(case.method, layout, folded)

    entries = sum(tensor.numel() for tensor in checkpoint().values())
    return Step({"plug": lambda: checkpoint().clear()}, [], 0, entries, held=[start])


def polish(case: Case) -> Step:
    """A forward pass of the plugged model."""
    model, layout = run_only(case)
    wrapped, _ = attach(model, case.method, layout, case.settings)
    wrapped.eval()
    loss, rows = _loss(case, wrapped), case.rows()

    def work() -> None:
        with torch.no_grad():
            loss(rows)

    marks: Marks = [(model, "model")]
    return Step({"polish": work}, marks, case.batch, chosen=case.batch * TARGETS[case.kind], held=[wrapped])


def evaluate(case: Case) -> Step:
    """Prompts are read, and their answers scored."""
    model, layout = run_only(case)
    wrapped, _ = attach(model, case.method, layout, case.settings)
    return _scoring(case, wrapped, [(model, "model")], use_cache=True)


def evaluate_bridge(case: Case) -> Step:
    """As `evaluate`, by a Bridge that reads tokens by itself."""
    bridge, wrapped, _ = _coupled_bridge(case, *case.on_meta())
    return _scoring(case, wrapped, [(bridge, "bridge")], use_cache=True)


def evaluate_ladder(case: Case) -> Step:
    """As `evaluate`, by a Bridge or a side network that the model's activations enter."""
    model, layout = run_only(case)
    bridge, wrapped, plan = _coupled_bridge(case, model, layout)
    ladder = {key: tensor.to(case.device) for key, tensor in start_ladder(layout, plan).items()}
    network = LadderNetwork(model, layout, bridge, wrapped, ladder)
    return _scoring(case, network, [(model, "model"), (bridge, "bridge")])


def evaluate_proxy(case: Case) -> Step:
    """As `evaluate`, by the model beside the tuned small one."""
    model, _ = run_only(case)
    assert case.small is not None
    small, narrow = replace(case, config=case.small, streamed=False, bits=None).build()
    wrapped, _ = attach(small, case.method, narrow, case.settings)
    return _scoring(case, ProxyTuned(model, wrapped), [(model, "model")])


def _coupled_bridge(
    case: Case, model: PreTrainedModel, layout: Layout
) -> tuple[PreTrainedModel, nn.Module, BridgePlan]:
    """A Bridge in the model's precision, the same with a module on it, and its plan."""
    bridge, plan = bridge_of(case, model, layout, case.dtype)
    narrow = Layout(layout.family, dict(plan.sizes), dict(layout.layers))
    return bridge, attach(bridge, case.method, narrow, case.settings)[0], plan


def _scoring(case: Case, network: nn.Module, marks: Marks, **how: bool) -> Step:
    network.eval()
    batch = gold(case.encoder, case.rows()).to(case.device)
    tokens: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if case.kind == "seq2seq":
        tokens["decoder_input_ids"] = batch.labels[:, :1]
    last = {"logits_to_keep": last_positions(1, case.device)} if case.kind == "causal" else {}

    def work() -> None:
        with torch.no_grad():
            network(**tokens, **last, **how)

    return Step({"evaluate": work}, marks, case.batch, held=[network])


def couplings() -> dict[str, MakeStep]:
    """A step of every coupling mode, by the mode's name."""
    return {name: partial(couple, mode_name=name) for name in MODES}


STEPS: dict[str, MakeStep] = {
    "full fine-tuning": finetune,
    "tuned": tune,
    "tuned, checkpointing": tune_checkpointed,
    "tuned, by blocks": tune_by_blocks,
    "ladder side-tuning": ladder_side_tuning,
    "score": score,
    "prune": prune,
    "repair": repair,
    **alignments(),
    **{f"couple, {name}": make for name, make in couplings().items()},
    "polish": polish,
    "plug": plug,
    "evaluate": evaluate,
    "evaluate, bridge": evaluate_bridge,
    "evaluate, ladder": evaluate_ladder,
    "evaluate, proxy": evaluate_proxy,
}
"""Every step by name. A step is a function of a case; one more is one more row."""
