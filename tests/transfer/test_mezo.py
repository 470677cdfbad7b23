"""MeZO: the gradient is the finite difference that it stands for, along a direction that the step's seed tells."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_coupling import double, large_model
from test_transfer import ROWS, SETTINGS, coupling_of
from torch import Tensor

from conftest import FAMILIES, METHODS, make_model
from plugbridge.evaluate import mean_loss
from plugbridge.progress import Silent
from plugbridge.tasks.encode import gold
from plugbridge.train import Schedule, fit, shares
from plugbridge.transfer.couple import MODES
from plugbridge.transfer.coupling import Coupling, require_gradients
from plugbridge.transfer.mezo import noise
from plugbridge.tuners.module import Module, attach, load_state, pack, parameter_name

GRID = [(family, method) for family in FAMILIES for method in METHODS]
SEED, STEPS = 7, 150


def _gradients(coupling: Coupling, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: tensor for name, tensor in coupling.parameters().items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def _directions(coupling: Coupling, seed: int) -> Module:
    """The noise of a step, drawn here once more."""
    wide = {slot: tensor for slot, tensor in coupling.at_large_width().items() if coupling.trains(slot)}
    return dict(zip(wide, noise(wide.values(), seed), strict=True))


@pytest.mark.parametrize(("family", "method"), GRID)
def test_the_estimate_is_the_finite_difference_it_stands_for(family: str, method: str) -> None:
    """Two forward passes of a model with the module loaded a little to either side, whatever the plug."""
    coupling = replace(double(family, method), perturbation=1e-3)
    z, wide = _directions(coupling, SEED), coupling.at_large_width()
    wrapped, _ = attach(large_model(family).double(), coupling.method, coupling.large, SETTINGS)
    values: list[Tensor] = []
    for sign in (1, -1):
        moved = {slot: tensor + sign * 1e-3 * z[slot] if slot in z else tensor for slot, tensor in wide.items()}
        load_state(wrapped.double().eval(), pack(coupling.method, coupling.large, moved))
        with torch.no_grad():
            values.append(mean_loss(wrapped, gold(coupling.encoder, ROWS), coupling.encoder.kind))
    slope = (values[0] - values[1]) / 2e-3
    wanted = _gradients(coupling, torch.stack([(slope * z[slot] * wide[slot]).sum() for slot in z]).sum())
    torch.manual_seed(SEED)
    loss = MODES["mezo"].start(coupling)(ROWS)
    assert torch.allclose(loss, (values[0] + values[1]) / 2, rtol=1e-7)
    found = _gradients(coupling, loss)
    assert found.keys() == wanted.keys()
    assert any(name.startswith("plug/") for name in found)
    for name, gradient in wanted.items():
        assert bool(gradient.any()), name
        assert torch.allclose(found[name], gradient, rtol=1e-6), name


def _alone() -> tuple[Coupling, Tensor]:
    """A coupling without a plug, and the exact gradient of its module, end to end."""
    family = "gpt2"
    coupling = double(family, "lora")
    module = {slot: t.detach().requires_grad_(coupling.trains(slot)) for slot, t in coupling.at_large_width().items()}
    coupling = replace(coupling, small=coupling.large, module=module, plug={}, perturbation=1e-4)
    wrapped, _ = attach(large_model(family).double(), coupling.method, coupling.large, SETTINGS)
    replaced = {parameter_name(key): t for key, t in pack(coupling.method, coupling.large, module).items()}

    def forward(**inputs):
        return torch.func.functional_call(wrapped.eval(), replaced, (), inputs)

    exact = _gradients(coupling, mean_loss(forward, gold(coupling.encoder, ROWS), coupling.encoder.kind))
    return coupling, torch.cat([gradient.flatten() for gradient in exact.values()])


def test_over_many_steps_the_estimate_is_the_gradient() -> None:
    """At every step it is z zᵀ times the gradient, whose mean is the gradient itself."""
    coupling, exact = _alone()
    loss, found = MODES["mezo"].start(coupling), list[Tensor]()
    for seed in range(STEPS):
        torch.manual_seed(seed)
        found.append(torch.cat([gradient.flatten() for gradient in _gradients(coupling, loss(ROWS)).values()]))
        z = torch.cat([part.flatten() for part in _directions(coupling, seed).values()])
        assert torch.allclose(found[-1], z * (z @ exact), rtol=1e-3, atol=1e-5 * float(z.abs().max()))
    mean = torch.stack(found).mean(0)
    cosine = float(torch.cosine_similarity(mean, exact, dim=0))
    expected = (STEPS / (STEPS + len(exact))) ** 0.5  # of a mean over so many directions in so many dimensions
    assert cosine == pytest.approx(expected, abs=0.08)
    assert float(mean @ exact / exact.square().sum()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_micro_batches_of_a_step_move_the_module_alike(family: str) -> None:
    coupling = double(family, "adapter")
    loss = MODES["mezo"].start(coupling)
    torch.manual_seed(SEED)
    whole = _gradients(coupling, loss(ROWS))
    summed: dict[str, Tensor] = {}
    torch.manual_seed(SEED)
    for part, share in shares(ROWS, 1, lambda row: row.weight):
        torch.rand(5)  # whatever else draws numbers meanwhile
        for name, gradient in _gradients(coupling, loss(part) * share).items():
            summed[name] = summed.get(name, torch.zeros(())) + gradient
    for name, gradient in whole.items():
        assert torch.allclose(summed[name], gradient, rtol=1e-6), name


def test_every_step_has_a_direction_of_its_own_and_a_killed_run_finds_it_again(tmp_path: Path) -> None:
    schedule = Schedule(4, 2, {"": 0.01}, 0.0, 0.0, 1.0, 2, seed=3)

    class Killed(Exception):
        pass

    def train(name: str, until: int | None = None) -> tuple[list[float], dict[str, Tensor]]:
        coupling = replace(coupling_of("gpt2", "lora"), large_model=make_model("gpt2", layers=2, seed=3))
        require_gradients(coupling)
        inner, calls = MODES["mezo"].start(coupling), list[int]()

        def loss(rows):
            calls.append(torch.initial_seed())
            if len(calls) == until:
                raise Killed
            return inner(rows)

        parameters = {name: t for name, t in coupling.parameters().items() if not name.startswith("bridge/")}
        try:
            losses = fit(parameters, ROWS, loss, schedule, tmp_path / name, Silent(), "mezo")
        except Killed:
            return [], {}
        assert len(set(calls)) == len(calls)
        return losses, parameters

    losses, whole = train("whole")
    train("killed", until=4)
    assert train("killed")[0] == losses
    again = train("killed")[1]
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    z = [next(noise([torch.zeros(4)], seed)) for seed in (1, 2, 1)]
    assert not torch.equal(z[0], z[1])
    assert torch.equal(z[0], z[2])
