"""Coupling on a large model in 8 or 4 bits: the loss is that model's own, the direction near the unquantised one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_backprop import autograd, backprop, without_dropout
from test_half_precision import READS_LARGE, cosine, gradient_of
from test_transfer import ROWS, SETTINGS, coupling_of

from conftest import FAMILIES, METHODS, make_model, pairwise
from plugbridge.config import LoadIn
from plugbridge.evaluate import mean_loss
from plugbridge.models import load_model
from plugbridge.tasks.encode import gold
from plugbridge.transfer.coupling import Coupling
from plugbridge.tuners.module import attach, load_state, pack, parameter_name
from test_quantised import BITS, load

NEAR = {"8bit": 0.998, "4bit": 0.9}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of every family; matrices small enough that rounding them does not change everything."""
    made: dict[str, Path] = {}
    for family in FAMILIES:
        model = make_model(family, hidden=64, layers=2, heads=16, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.4 if parameter.dim() > 1 else 1)
        made[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(made[family])
    return made


def couplings(folder: Path, family: str, method: str, load_in: LoadIn) -> tuple[Coupling, Coupling]:
    """The same coupling twice: with the large model as it is, and quantised."""
    found = [
        replace(coupling_of(family, method, large_model=load_model(str(folder))), large_model=large, train_bridge=False)
        for large in (load_model(str(folder)), load(str(folder), load_in)[0])
    ]
    return found[0], found[1]


@pytest.mark.parametrize(("family", "method", "load_in"), pairwise(FAMILIES, METHODS, BITS))
def test_feedback_through_quantised_weights(
    folders: dict[str, Path], family: str, method: str, load_in: LoadIn
) -> None:
    whole, coupling = couplings(folders[family], family, method, load_in)
    large = coupling.large_model
    assert large is not None
    weights = {name: (p, p.detach().clone()) for name, p in large.named_parameters()}
    loss, found = gradient_of(coupling, "feedback")

    state = {key: t.detach() for key, t in pack(coupling.method, coupling.large, coupling.at_large_width()).items()}
    wrapped, _ = attach(load(str(folders[family]), load_in)[0], coupling.method, coupling.large, SETTINGS)
    assert {parameter_name(key) for key in state} == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    load_state(wrapped.eval(), state)
    with torch.no_grad():
        plain = mean_loss(wrapped, gold(coupling.encoder, ROWS), coupling.encoder.kind)
    assert loss == pytest.approx(float(plain), rel=1e-5)

    _, wanted = gradient_of(whole, "feedback")
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert cosine(found, wanted) > NEAR[load_in]
    for name, (parameter, before) in weights.items():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name
        assert torch.equal(parameter, before), name


@pytest.mark.parametrize(("family", "load_in"), [("gpt2", "4bit"), ("t5", "8bit"), ("llama", "4bit")])
def test_errors_through_packed_matrices_beside_quantised_ones(
    folders: dict[str, Path], family: str, load_in: LoadIn
) -> None:
    whole, coupling = couplings(folders[family], family, "lora", load_in)
    (exact, wanted), (loss, found) = (
        gradient_of(replace(each, activations="large"), "feedback") for each in (whole, coupling)
    )
    assert loss == pytest.approx(exact, rel=0.1)
    assert cosine(found, wanted) > NEAR[load_in]


@pytest.mark.parametrize(("family", "mode", "load_in"), pairwise(FAMILIES, READS_LARGE[1:], BITS))
def test_the_other_modes_that_run_it(folders: dict[str, Path], family: str, mode: str, load_in: LoadIn) -> None:
    whole, coupling = couplings(folders[family], family, "lora", load_in)
    (exact, wanted), (loss, found) = gradient_of(whole, mode), gradient_of(coupling, mode)
    assert loss == pytest.approx(exact, rel=0.1)
    assert cosine(found, wanted) > NEAR[load_in]
    assert coupling.large_model is not None
    assert all(p.grad is None for p in coupling.large_model.parameters())


@pytest.mark.parametrize(("family", "method", "load_in"), pairwise(("gpt2", "t5", "llama"), METHODS, BITS))
def test_backpropagation_is_that_of_the_quantised_model(
    folders: dict[str, Path], family: str, method: str, load_in: LoadIn
) -> None:
    """QLoRA, where it is LoRA in 4 bits."""
    _, coupling = couplings(folders[family], family, method, load_in)
    _, other = couplings(folders[family], family, method, load_in)
    (value, wanted), (loss, found) = autograd(without_dropout(other), ROWS), backprop(without_dropout(coupling), ROWS)
    assert loss == pytest.approx(value, rel=1e-5)
    assert found.keys() == wanted.keys()
    assert cosine(found, wanted) > 0.9999
    assert coupling.large_model is not None
    assert all(p.grad is None for p in coupling.large_model.parameters())
