"""Feedback coupling: with an unpruned Bridge it is backpropagation."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from test_transfer import ROWS, SETTINGS, coupling_of
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from conftest import FAMILIES, METHODS, make_model, pairwise
from plugbridge.evaluate import mean_loss
from plugbridge.memory.alive import Alive
from plugbridge.models import fuse_gelu
from plugbridge.shrink.bridge import prune_model
from plugbridge.tasks.encode import gold
from plugbridge.transfer import feedback as transfer_feedback
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, require_gradients
from plugbridge.transfer.feedback import Visit
from plugbridge.transfer.residual_gradient import ResidualGradient
from plugbridge.tuners.module import attach, pack, parameter_name

GRID = [(family, method) for family in FAMILIES for method in METHODS]


def _without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights of exactly 0 in every norm, as Gemma has them, and one as good as 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter[[1, 6, 15]] = 0.0
                parameter[8] = 1e-30
    return model


def _double(coupling: Coupling, family: str) -> Coupling:
    """The coupling in float64, with the large model it was pruned from."""
    tensors = {
        part: {key: tensor.detach().double() for key, tensor in getattr(coupling, part).items()}
        for part in ("module", "plug", "down")
    }
    large = make_model(family, hidden=16, layers=2, heads=4, seed=3).double()
    double = replace(coupling, **tensors, bridge=coupling.bridge.double(), large_model=large, train_bridge=False)
    require_gradients(double)
    return double


def _gradients(coupling: Coupling, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = coupling.parameters()
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def _rotated(coupling: Coupling) -> Coupling:
    """The same unpruned Bridge on a rotated residual stream."""
    large = cast(PreTrainedModel, coupling.large_model)
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    plan = replace(coupling.plan, basis={"hidden": basis})
    return replace(coupling, plan=plan, bridge=prune_model(large, coupling.large, plan, {}))


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm's mean square and T5's attention softmax in float32: leave float64 alone."""

    def norm(self: Any, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(T5LayerNorm, "forward", norm)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.promote_types(self.dtype, torch.float32)))
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(
    ("family", "method", "rotated_zeros_recompute"),
    pairwise(FAMILIES, METHODS, ((False, False, True), (True, True, True), (False, True, False))),
)
def test_an_unpruned_bridge_makes_it_backpropagation(
    family: str, method: str, rotated_zeros_recompute: tuple[bool, bool, bool]
) -> None:
    """Whether the Bridge's sublayers are run for it, or the large model's own forward pass is differentiated."""
    rotated, zeros, recompute = rotated_zeros_recompute
    for activations in ("bridge", "large"):
        coupling = replace(
            _double(coupling_of(family, method, reduction=1), family), recompute=recompute, activations=activations
        )
        _check_against_backpropagation(coupling, family, rotated, zeros)


def _check_against_backpropagation(coupling: Coupling, family: str, rotated: bool, zeros: bool) -> None:
    twin = make_model(family, hidden=16, layers=2, heads=4, seed=3).double()
    if zeros:
        for model in (coupling.bridge, coupling.large_model, twin):
            _without_weights(cast(torch.nn.Module, model))
    if rotated:
        coupling = _rotated(coupling)
    wrapped, _ = attach(twin, coupling.method, coupling.large, SETTINGS)
    state = pack(coupling.method, coupling.large, coupling.at_large_width())
    replaced = {parameter_name(key): tensor for key, tensor in state.items()}

    def forward(**inputs):
        return torch.func.functional_call(wrapped.eval(), replaced, (), inputs)

    exact = mean_loss(forward, gold(coupling.encoder, ROWS), coupling.encoder.kind)
    wanted = _gradients(coupling, exact)
    loss = MODES["feedback"].start(coupling)(ROWS)
    found = _gradients(coupling, loss)
    assert torch.allclose(loss, exact, rtol=1e-9)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or float(found[name].abs().max()) == 0, name
        assert float((found[name] - gradient).abs().max()) <= 1e-9 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_without_a_module_keeps_what_the_bridge_reads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the norm gives and what it normalised, at the Bridge's width, and 1/rms; at full width for a module."""
    coupling = _double(coupling_of(family, "lora", reduction=2), family)
    coupling = replace(coupling, first=dict.fromkeys(coupling.large.layers, 1))
    seen: list[Visit] = []
    monkeypatch.setattr(transfer_feedback, "send_back", lambda *given: seen.extend(replace(v) for v in given[3]))
    monkeypatch.setattr(transfer_feedback, "_needed", lambda _coupling, visits: visits)
    with pytest.raises(RuntimeError):  # no gradient has come back: there is nothing to add up
        MODES["feedback"].start(coupling)(ROWS)
    assert {visit.place.layer for visit in seen} == {0, 1}
    narrow, wide = coupling.plan.sizes["hidden"], coupling.large.sizes["hidden"]
    for visit in seen:
        assert (visit.low.numel() > 0) == (visit.x.numel() == 0)
        assert visit.low.numel() == 0 or visit.low.shape[-1] == narrow
        assert visit.unit.shape[-1] == narrow
        assert visit.inverse.shape[-1] == 1
        assert visit.output is None
        assert visit.x.numel() == 0 or (visit.x.shape[-1] == wide and visit.place.layer == 1)
    assert {visit.x.numel() > 0 for visit in seen if visit.place.layer == 1} == {False, True}  # attention has a module


@pytest.mark.parametrize(("family", "method", "mode"), pairwise(FAMILIES, METHODS, ("feedback", "identity")))
def test_kept_graphs_give_the_gradients_of_sublayers_run_again(family: str, method: str, mode: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    runs: list[int] = []
    for recompute in (True, False):
        coupling = replace(_double(coupling_of(family, method), family), recompute=recompute)
        assert coupling.large_model is not None
        seen: list[object] = []
        for path, _ in coupling.large.functions():
            function = coupling.large_model.get_submodule(path)
            function.register_forward_pre_hook(lambda module, _inputs, seen=seen: seen.append(module))
        found.append(_gradients(coupling, MODES[mode].start(coupling)(ROWS)))
        runs.append(len(seen))
    again, kept = found
    assert runs[1] < runs[0]
    assert runs[1] == len(list(coupling.large.functions()))
    assert any(float(gradient.abs().max()) > 0 for gradient in again.values())
    for name, gradient in again.items():
        assert torch.allclose(kept[name], gradient, rtol=1e-9, atol=1e-12), name


def test_gelu_in_one_kernel_has_the_same_value() -> None:
    bridge = _double(coupling_of("gpt2", "lora"), "gpt2").bridge
    ids = torch.arange(8).view(1, 8)
    before = bridge(ids).logits
    fuse_gelu(bridge)
    assert [type(block.mlp.act) for block in bridge.transformer.h] == [torch.nn.GELU] * 2
    assert torch.allclose(bridge(ids).logits, before, rtol=1e-12)


def test_feedback_computes_gelu_in_one_kernel() -> None:
    coupling = _double(coupling_of("gpt2", "lora"), "gpt2")
    MODES["feedback"].start(coupling)
    assert coupling.large_model is not None
    for model in (coupling.large_model, coupling.bridge):
        acts = {type(module) for name, module in model.named_modules() if name.endswith("mlp.act")}
        assert acts == {torch.nn.GELU}


def _projected(coupling: Coupling, family: str) -> Coupling:
    """The same with a Bridge on a projection of the residual stream, the default."""
    large = make_model(family, hidden=16, layers=2, heads=4, seed=3).double()
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(16, coupling.plan.sizes["hidden"], dtype=torch.float64, generator=generator)
    plan = replace(coupling.plan, basis={"hidden": torch.linalg.qr(columns).Q.mT.contiguous()})
    return replace(coupling, plan=plan, bridge=prune_model(large, coupling.large, plan, {}))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_between_steps_stays_as_it_was(family: str, projected: bool) -> None:
    def made(recompute: bool) -> Coupling:
        coupling = replace(_double(coupling_of(family, "lora"), family), recompute=recompute)
        return _projected(coupling, family) if projected else coupling

    kept, anew = made(False), made(True)
    loss = MODES["feedback"].start(kept)
    first, second = (_gradients(kept, loss(ROWS)) for _ in range(2))
    again = _gradients(anew, MODES["feedback"].start(anew)(ROWS))
    assert any(float(gradient.abs().max()) > 0 for gradient in first.values())
    for name, gradient in first.items():
        assert torch.equal(second[name], gradient), name
        assert torch.allclose(again[name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(("method", "spared"), [("lora", True), ("adapter", False)])
def test_the_last_product_is_spared_where_nothing_reads_it(
    method: str, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flops() -> int:
        coupling = _double(coupling_of("gpt2", method), "gpt2")
        with Alive() as counted:
            MODES["feedback"].start(coupling)(ROWS)
        return sum(counted.flops.values())

    fewer = flops()
    monkeypatch.setattr(transfer_feedback, "unread", lambda _layer: nullcontext())
    assert (fewer < flops()) == spared


@pytest.mark.parametrize(("family", "method"), GRID)
def test_no_weight_of_the_large_model_ever_gets_a_gradient(family: str, method: str) -> None:
    coupling = _double(coupling_of(family, method), family)
    large = coupling.large_model
    assert large is not None
    weights = {name: (p, p.detach().clone()) for name, p in large.named_parameters()}
    wanting: list[str] = []

    def watch(module: torch.nn.Module, *_: object) -> None:
        own = {id(p) for p, _ in weights.values()}
        wanting.extend(n for n, p in module.named_parameters() if id(p) in own and p.requires_grad)

    loss = MODES["feedback"].start(coupling)
    for module in large.modules():
        module.register_forward_pre_hook(watch)
    loss(ROWS).backward()
    assert wanting == []
    for name, (parameter, before) in weights.items():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before), name
    gradients = {name: tensor.grad for name, tensor in coupling.parameters().items()}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    assert sum(float(g.abs().sum()) > 0 for g in gradients.values() if g is not None) > len(gradients) // 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_head_whose_output_is_not_used_is_one_product_for_all_rows(family: str) -> None:
    coupling, whole = _double(coupling_of(family, "lora"), family), []
    large = coupling.large_model
    assert large is not None
    large.get_output_embeddings().register_forward_pre_hook(lambda _, given: whole.append(given[0].is_contiguous()))
    MODES["feedback"].start(coupling)(ROWS)
    assert whole == [True, True]  # forward, and its gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_plugged_models_and_what_it_sends_back_stays(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coupling = replace(
        coupling_of(family, "lora"),
        large_model=make_model(family, hidden=16, layers=2, heads=4, seed=3),
        train_bridge=False,
    )
    require_gradients(coupling)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    head, back = transfer_feedback.head_gradient, transfer_feedback.send_back

    def head_gradient(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(head(*given))
        return seen[-1][0] * 1000, seen[-1][1] * 1e6  # a loss beside a much larger surrogate

    def send_back(*given: Any) -> ResidualGradient:
        before = given[4].clone()
        found = back(*given)
        assert torch.equal(given[4], before)
        assert not torch.allclose(found.wide(), before)
        return found

    monkeypatch.setattr(transfer_feedback, "head_gradient", head_gradient)
    monkeypatch.setattr(transfer_feedback, "send_back", send_back)
    loss = MODES["feedback"].start(coupling)(ROWS)
    assert torch.equal(loss.detach(), seen[0][0] * 1000)
