"""Ladder coupling: what climbs is what the gates say, and a cache changes nothing but the work."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_coupling import double, large_model, tolerance_of
from test_transfer import SETTINGS, coupling_of
from torch import Tensor, nn

from conftest import FAMILIES, METHODS
from plugbridge.evaluate import log_likelihood, mean_loss, option_scores
from plugbridge.progress import Silent
from plugbridge.shrink.bridge import prune_model
from plugbridge.tasks.encode import Encoded, collate, gold
from plugbridge.tensors.axes import Project
from plugbridge.transfer.cache import CacheKind, make_cache
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, bridge_state
from plugbridge.transfer.ladder import LadderNetwork, length_in, rungs_of, start_ladder
from plugbridge.tuners.module import attach, load_state

GRID = [(family, method) for family in FAMILIES for method in METHODS]
OPTIONS = ((3, 1), (4, 5, 1))
A, B, C, D = (
    Encoded(prompt, OPTIONS, answer)
    for prompt, answer in (((8, 9, 10, 12), 0), ((11, 12), 1), ((13, 14, 15, 9, 8, 20), 1), ((16, 17, 18), 0))
)
BATCHES = [[A, B], [B, C, A], [C, C, D, C], [B], [A, D]]


def _ladder(family: str, method: str, gates: float | None = None, train_bridge: bool = False) -> Coupling:
    """A ladder in float64 with gates of one value, or random ones, and down maps that are no selection."""
    coupling = replace(double(family, method, reduction=2, upper=False), train_bridge=train_bridge)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in start_ladder(coupling.large, coupling.plan).items():
        noise = torch.randn(tensor.shape, generator=generator)
        started = 0.05 * noise if name.startswith("gate/") else tensor + 0.1 * noise
        coupling.ladder[name] = started.double()
        if name.startswith("gate/") and gates is not None:
            coupling.ladder[name] = torch.tensor(gates, dtype=torch.float64)
    return coupling


@contextmanager
def _entering(model: nn.Module, paths: dict[str, str], last: bool) -> Generator[dict[str, Tensor]]:
    """What modules are given: `last`, after all hooks before them have changed it."""
    found: dict[str, Tensor] = {}

    def keep(rung: str, inputs: tuple, keywords: dict) -> None:
        found[rung] = (inputs[0] if inputs else keywords["hidden_states"]).detach().clone()

    with ExitStack() as hooks:
        for rung, path in paths.items():
            module = model.get_submodule(path)
            if last:
                hook = module.register_forward_hook(lambda _, i, k, __, rung=rung: keep(rung, i, k), with_kwargs=True)
            else:
                hook = module.register_forward_pre_hook(lambda _, i, k, rung=rung: keep(rung, i, k), with_kwargs=True)
            hooks.callback(hook.remove)
        yield found


def _heights(coupling: Coupling, family: str, rows: list[Encoded]) -> dict[str, Tensor]:
    """What the bare large model gives its layers and final norms: transformers' own hidden states."""
    model, rungs = large_model(family).double(), rungs_of(coupling.large)
    ends = {rung: path for rung, path in rungs.items() if rung.endswith(":end")}
    with torch.no_grad(), _entering(model, ends, last=False) as found:
        batch = gold(coupling.encoder, rows).inputs(coupling.encoder.kind)
        output = model(**batch, output_hidden_states=True)
    for stack, count in coupling.large.layers.items():
        hidden = getattr(output, f"{stack}_hidden_states", None) or output.hidden_states
        found.update({f"{stack}:{layer}": hidden[layer] for layer in range(count)})
    return found


class Trained:
    """A coupling's loss in a mode, with its gradients by name; the same dropout every time."""

    def __init__(self, coupling: Coupling, mode: str = "ladder") -> None:
        self.parameters = coupling.parameters()  # before peft puts a module of its own on the Bridge
        self.loss = MODES[mode].start(coupling)

    def __call__(self, rows: list[Encoded]) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        loss = self.loss(rows)
        named = {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}
        return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _near(found: Tensor, wanted: Tensor, family: str) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=tolerance_of(family) * float(wanted.abs().max()))


# what enters the Bridge


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_a_rung_at_every_layer_and_every_final_norm(family: str) -> None:
    coupling = coupling_of(family, "lora")
    stacks = ("encoder", "decoder") if family.startswith("t5") else ("decoder",)
    rungs = rungs_of(coupling.large)
    assert list(rungs) == [f"{stack}:{place}" for stack in stacks for place in (0, 1, "end")]
    modules = [coupling.bridge.get_submodule(path) for path in rungs.values()]
    assert len({id(module) for module in modules}) == len(rungs)


@pytest.mark.parametrize("projected", [False, True])
def test_a_ladder_starts_half_open_on_the_bridges_own_channels(projected: bool) -> None:
    coupling = coupling_of("gpt2", "lora")
    plan = coupling.plan
    if projected:
        basis = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).Q.mT
        plan = replace(plan, basis={"hidden": basis})
    started = start_ladder(coupling.large, plan)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert set(started) == {f"{part}/{rung}" for part in ("gate", "down") for rung in rungs_of(coupling.large)}
    for name, tensor in started.items():
        if name.startswith("gate/"):
            assert float(torch.sigmoid(tensor)) == 0.5
        else:
            assert torch.allclose(x @ tensor.mT, plan.op("hidden").apply(x, 1), rtol=0, atol=1e-6)
            assert isinstance(plan.op("hidden"), Project) == projected
    assert len({tensor.data_ptr() for tensor in started.values()}) == len(started)  # each rung's is its own


@pytest.mark.parametrize(("family", "method"), GRID)
def test_gates_at_the_backbone_let_nothing_of_the_bridge_pass(family: str, method: str) -> None:
    coupling = _ladder(family, method, gates=-1e4)
    loss, rows = MODES["ladder"].start(coupling), [A, B, C]
    with _entering(coupling.bridge, rungs_of(coupling.large), last=True) as entered:
        loss(rows)
    heights = _heights(coupling, family, rows)
    assert entered.keys() == heights.keys()
    for rung, found in entered.items():
        assert _near(found, heights[rung] @ coupling.ladder[f"down/{rung}"].detach().mT, family), rung


@pytest.mark.parametrize(("family", "method"), GRID)
def test_gates_at_the_bridge_make_it_standalone(family: str, method: str) -> None:
    alone, coupling = (_ladder(family, method, gates=1e4, train_bridge=True) for _ in range(2))
    alone.ladder.clear()
    step = Trained(coupling)
    value, wanted = Trained(replace(alone, recompute=False), "standalone")([A, B, C])
    found, gradients = step([A, B, C])
    assert torch.equal(found, value)
    assert {name for name in gradients if not name.startswith("ladder/")} == set(wanted)
    for name, gradient in gradients.items():
        if name.startswith("ladder/"):
            assert not gradient.any(), name
        else:
            assert _near(gradient, wanted[name], "gpt2"), name
    with torch.no_grad():
        for name, tensor in coupling.ladder.items():
            tensor.mul_(0 if name.startswith("gate/") else 1)
    assert not torch.allclose(step([A, B, C])[0], value, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), GRID)
def test_what_enters_is_mixed_by_the_gates(family: str, method: str) -> None:
    """Sung et al. 2022, section 3: sigmoid(alpha / 0.1) of what the Bridge has, the rest from below."""
    coupling = _ladder(family, method)
    rungs, rows = rungs_of(coupling.large), [A, B, C]
    loss = MODES["ladder"].start(coupling)
    with (
        _entering(coupling.bridge, rungs, last=False) as given,
        _entering(coupling.bridge, rungs, last=True) as entered,
    ):
        loss(rows)
    heights = _heights(coupling, family, rows)
    for rung, found in entered.items():
        share = 1 / (1 + torch.exp(-10 * coupling.ladder[f"gate/{rung}"].detach()))
        assert 0.1 < float(share) < 0.9
        climbed = heights[rung] @ coupling.ladder[f"down/{rung}"].detach().mT
        assert _near(found, share * given[rung] + (1 - share) * climbed, family), rung
        assert not torch.allclose(found, given[rung], atol=1e-2), rung


def test_a_projected_bridge_climbs_too() -> None:
    coupling = _ladder("gpt2", "lora", gates=-1e4)
    basis = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))).Q.mT.double()
    plan = replace(coupling.plan, basis={"hidden": basis})
    bridge = prune_model(large_model("gpt2").double(), coupling.large, plan, {})
    coupling = replace(coupling, plan=plan, bridge=bridge)
    loss = MODES["ladder"].start(coupling)
    with _entering(bridge, rungs_of(coupling.large), last=True) as entered:
        assert bool(loss([A, B]).isfinite())
    height = _heights(coupling, "gpt2", [A, B])["decoder:1"]
    assert _near(entered["decoder:1"], height @ coupling.ladder["down/decoder:1"].detach().mT, "gpt2")


# training


@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_ladder_trains_every_part_and_not_the_large_model(family: str, method: str) -> None:
    large = large_model(family).train()  # comes ready to train
    coupling = replace(coupling_of(family, method), large_model=large)
    weights = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    wanting: list[str] = []
    loss = MODES["ladder"].start(coupling)
    started = start_ladder(coupling.large, coupling.plan)
    assert coupling.ladder.keys() == started.keys()
    assert all(torch.equal(tensor, started[name]) for name, tensor in coupling.ladder.items())
    with torch.no_grad():
        for tensor in coupling.ladder.values():  # Llama's embeddings are alike on both sides: no gate would matter
            tensor.add_(0.05 * torch.randn(tensor.shape))

    def watch(module: nn.Module, *_: object) -> None:
        wanting.extend(name for name, parameter in module.named_parameters() if parameter.requires_grad)

    for module in large.modules():
        module.register_forward_hook(watch)
    loss([A, B, C]).backward()
    assert not large.training
    assert wanting == []
    assert all(parameter.grad is None for parameter in large.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in large.state_dict().items())
    parameters = coupling.parameters()
    assert all(parameters[f"ladder/{name}"] is tensor for name, tensor in coupling.ladder.items())
    for part in ("module", "plug", "bridge"):
        gradients = [t.grad for n, t in parameters.items() if n.startswith(f"{part}/")]
        assert any(g is not None and float(g.abs().sum()) > 0 for g in gradients), part
    for name, tensor in coupling.ladder.items():
        assert tensor.grad is not None, name
        assert float(tensor.grad.abs().sum()) > 0, name


def test_hooks_are_gone_after_a_step() -> None:
    coupling = replace(coupling_of("t5", "lora"), large_model=large_model("t5"))
    loss = MODES["ladder"].start(coupling)
    loss([A])
    assert coupling.large_model is not None
    for model in (coupling.large_model, coupling.bridge):
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def _network(coupling: Coupling, family: str) -> LadderNetwork:
    """What `evaluate` scores: the ladder with a Bridge and a module that were read from disk."""
    large = large_model(family).double()
    bridge = prune_model(large, coupling.large, coupling.plan, {})
    inner, _ = attach(bridge, coupling.method, coupling.bridge_layout(), SETTINGS)
    load_state(inner.double(), bridge_state(coupling))
    ladder = {name: tensor.detach() for name, tensor in coupling.ladder.items()}
    return LadderNetwork(large, coupling.large, bridge, inner, ladder).eval()


@pytest.mark.parametrize(("family", "method"), GRID)
def test_the_network_of_inference_is_the_one_that_trained(family: str, method: str) -> None:
    coupling, logits = _ladder(family, method), []
    loss = MODES["ladder"].start(coupling)

    def listen(module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _module, _inputs, output: logits.append(output.logits.detach()))

    handle = listen(coupling.bridge)
    value = loss([A, B, C])
    handle.remove()
    network = _network(coupling, family)
    listen(network)
    batch, kind = gold(coupling.encoder, [A, B, C]), coupling.encoder.kind
    assert torch.allclose(mean_loss(network, batch, kind), value, rtol=tolerance_of(family))
    listen(network.inner)
    mean_loss(network.inner, batch, kind)
    trained, inferred, alone = logits
    assert _near(inferred, trained, family)
    assert not torch.allclose(alone, trained, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [((3,), (4,)), ((3, 5), (4, 5, 6), (3,))], ids=["one token", "several tokens"])
@torch.no_grad()
def test_its_scores_equal_a_plain_loop_whatever_the_batch(family: str, options: tuple[tuple[int, ...], ...]) -> None:
    coupling = _ladder(family, "lora")
    kind, network = coupling.encoder.kind, _network(coupling, family)
    single = options == ((3,), (4,))  # single tokens have no end mark, as they are encoded
    end = (1,) if kind == "seq2seq" and not single else ()
    ended = tuple((*option, *end) for option in options)
    rows = [replace(row, options=ended, answer=0) for row in (A, B, C, D)]
    expected = []
    for row in rows:
        pairs = [(row.prompt, option) for option in ended]
        alone = [log_likelihood(network, collate(coupling.encoder, [pair]), kind) for pair in pairs]
        expected.append([float(value) for value in alone])
    for batch_size in (1, 3, 100):
        found = option_scores(network, coupling.encoder, rows, batch_size, Silent(), "")
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_row_takes_the_positions_of_what_is_trained() -> None:
    row = Encoded((3, 4), ((5, 6, 7), (8, 6)), 0)
    assert [length_in(replace(row, score=score), "decoder", "causal") for score in ("sum", "mean", "first")] == [
        5,
        5,
        3,
    ]
    assert length_in(replace(row, score="first"), "decoder", "seq2seq") == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_no_head_runs_where_no_answer_begins(family: str) -> None:
    """A row of each length: a place for each of the Bridge's answers, one for the large model, which gives none."""
    coupling, seen = _ladder(family, "lora"), dict[str, int]()
    network = _network(coupling, family)

    def listen(name: str, model: Any) -> None:
        def keep(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            seen[name] = inputs[0].shape[1]

        model.get_output_embeddings().register_forward_pre_hook(keep)

    listen("large", network.large)
    listen("bridge", network.bridge)
    rows = [replace(row, options=((3,), (4,)), answer=0) for row in (A, B, C, D)]
    option_scores(network, coupling.encoder, rows, 4, Silent(), "")
    assert seen == {"large": 1, "bridge": len({len(row.prompt) for row in rows})}
    assert seen["bridge"] < max(len(row.prompt) for row in rows)
    loss = MODES["ladder"].start(coupling)
    listen("large", coupling.large_model)
    seen.clear()
    loss([A, B])
    assert seen == {"large": 1}


# the cache


@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_cache_changes_neither_loss_nor_gradients(family: str, method: str, tmp_path: Path) -> None:
    """Padding is not kept: what a row's own positions see does not depend on the rows beside it."""
    plain, *cached = (
        Trained(replace(_ladder(family, method, train_bridge=True), cache=make_cache(kind, tmp_path)))
        for kind in ("off", "memory", "disk")
    )
    for rows in BATCHES[:3]:
        value, wanted = plain(rows)
        for step in cached:
            found, gradients = step(rows)
            assert torch.allclose(found, value, rtol=tolerance_of(family))
            assert gradients.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert _near(gradients[name], gradient, family), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["off", "memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_the_large_model_reads_each_row_once(family: str, kind: CacheKind, tmp_path: Path) -> None:
    coupling = replace(_ladder(family, "lora"), cache=make_cache(kind, tmp_path))
    loss, seen = MODES["ladder"].start(coupling), []
    assert coupling.large_model is not None
    coupling.large_model.register_forward_pre_hook(
        lambda _module, _inputs, keywords: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    for rows in BATCHES:
        loss(rows)
    assert seen == ([len(rows) for rows in BATCHES] if kind == "off" else [2, 1, 1])
    if coupling.cache is not None:
        positions = {"encoder": 0, "decoder": 0}
        for row in (A, B, C, D):
            prompt, target = len(row.prompt), len(row.options[row.answer])
            positions["encoder"] += prompt
            positions["decoder"] += target if family.startswith("t5") else prompt + target
        rungs = [rung.partition(":")[0] for rung in rungs_of(coupling.large)]
        assert coupling.cache.bytes == sum(8 * 16 * positions[stack] for stack in rungs)


def test_rows_that_are_equal_are_one_row_to_a_cache(tmp_path: Path) -> None:
    coupling = replace(_ladder("gpt2", "lora"), cache=make_cache("memory", tmp_path))
    loss, seen = MODES["ladder"].start(coupling), []
    assert coupling.large_model is not None
    coupling.large_model.register_forward_pre_hook(
        lambda _module, _inputs, keywords: seen.append(len(keywords["input_ids"])), with_kwargs=True
    )
    twin = replace(A)
    assert twin is not A
    loss([A, twin, B])
    loss([twin])
    assert seen == [2]
    assert coupling.cache is not None
    assert coupling.cache.bytes == 8 * 16 * 3 * sum(len(row.prompt) + len(row.options[row.answer]) for row in (A, B))
