"""Scores: Fisher of one batch is autograd's squared gradient; activation scores match their formula."""

import pytest
import torch

from conftest import FAMILIES, make_model, token_inputs
from plugbridge.memory.alive import Alive
from plugbridge.models import layout_for
from plugbridge.shrink.importance import (
    activation,
    fisher,
    magnitude,
    record_inputs,
    record_second_moments,
    residual_energy,
    scope_key,
)


def _samples(model, count: int = 3) -> list[dict[str, torch.Tensor]]:
    samples = [token_inputs(model, rows=1, seed=i) for i in range(count)]
    for sample in samples:
        sample["attention_mask"].fill_(1)
    return samples


def _likelihood(model):
    def value(sample):
        logits = model(**sample).logits.double()
        return torch.log_softmax(logits[0, -1], -1)[4]

    return value


def _unit_sum(tensor: torch.Tensor, names: tuple[str, ...], sizes: dict[str, int], axis: str) -> torch.Tensor:
    i = names.index(axis)
    return tensor.reshape([sizes[n] for n in names]).movedim(i, 0).reshape(sizes[axis], -1).sum(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_the_mean_squared_gradient_of_single_samples(family: str) -> None:
    from plugbridge.tensors.patterns import axis_names

    model = make_model(family)
    layout = layout_for(model)
    samples = _samples(model)
    found = fisher(model, layout, samples, _likelihood(model))
    wanted: dict[str, torch.Tensor] = {}
    table = layout.table()
    for sample in samples:
        model.zero_grad()
        _likelihood(model)(sample).backward()
        for name, parameter in model.named_parameters():
            names = axis_names(table[name].pattern)
            for axis in names:
                key = scope_key(layout, axis, table[name].place)
                if key is not None and parameter.grad is not None:
                    part = _unit_sum(parameter.grad.double() ** 2, names, layout.sizes, axis) / len(samples)
                    wanted[key] = wanted.get(key, torch.zeros_like(part)) + part
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert torch.allclose(found[key], values, rtol=1e-5), key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_covers_every_prunable_unit(family: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    samples = _samples(model)
    forward = _likelihood(model)
    by_name = {
        "fisher": fisher(model, layout, samples, forward),
        "activation": activation(model, layout, samples, forward),
        "magnitude": magnitude(model, layout),
    }
    for name, scores in by_name.items():
        assert scores.keys() == by_name["fisher"].keys(), name
        for key, values in scores.items():
            assert values.shape == (layout.sizes[key.partition("@")[0]],)
            assert bool((values >= 0).all())
            assert float(values.sum()) > 0


def test_scores_depend_on_what_they_say() -> None:
    """A head whose output weights are zero has no activation score; a dead MLP unit has no Fisher."""
    model = make_model("gpt2")
    layout = layout_for(model)
    block = model.transformer.h[0]
    with torch.no_grad():
        block.attn.c_proj.weight[4:8] = 0  # head 1 of 4, head_dim 4
        block.mlp.c_proj.weight[3] = 0
        block.mlp.c_fc.weight[:, 3] = 0
        block.mlp.c_fc.bias[3] = 0
    samples = _samples(model)
    scores = activation(model, layout, samples, _likelihood(model))
    assert float(scores["heads@decoder.0"][1]) == 0
    assert float(scores["heads@decoder.0"][0]) > 0
    assert float(fisher(model, layout, samples, _likelihood(model))["ffn@decoder.0"][3]) == 0


def test_activation_is_squared_weight_times_mean_squared_input() -> None:
    model = make_model("gpt2")
    layout = layout_for(model)
    samples = _samples(model)
    found = activation(model, layout, samples, _likelihood(model))["ffn@decoder.1"]
    reader = model.transformer.h[1].mlp.c_proj
    with record_inputs({"x": reader}) as moments, torch.no_grad():
        for sample in samples:
            model(**sample)
    wanted = moments.mean("x") * reader.weight.detach().double().square().sum(1)
    assert torch.allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_only_scores_make_no_gradient(family: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    samples = _samples(model)
    activation(model, layout, samples, lambda s: model(**s))
    residual_energy(model, layout, samples, lambda s: model(**s))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments_of_what_sublayers_read_and_of_the_error_at_what_they_write(family: str) -> None:
    model = make_model(family)
    layout = layout_for(model)
    sample = _samples(model, 1)[0]
    block = "transformer.h.1.mlp" if family == "gpt2" else next(path for path, _ in layout.functions())
    seen: dict[str, torch.Tensor] = {}

    def keep(_module, inputs, keywords, output) -> None:
        seen["x"] = (inputs[0] if inputs else keywords["hidden_states"]).detach()
        seen["y"] = output[0] if isinstance(output, tuple) else output
        seen["y"].retain_grad()

    handle = model.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    with record_second_moments(model, layout) as moments:
        _likelihood(model)(sample).backward()
    handle.remove()
    for kind, x in (("activity", seen["x"]), ("error", seen["y"].grad)):
        flat = x.reshape(-1, 16).double()
        assert torch.allclose(moments.sums[kind, block], flat.T @ flat, rtol=1e-5, atol=1e-12), kind
        counted = [m for (k, _), m in moments.sums.items() if k == kind and m.trace() > 0]
        total = moments.total(kind)
        assert total is not None
        assert torch.allclose(total.trace(), torch.tensor(float(len(counted))).double())
    with record_second_moments(model, layout) as forward_only, torch.no_grad():
        model(**sample)
    assert forward_only.total("error") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_never_has_all_gradients_at_once(family: str) -> None:
    model = make_model(family, hidden=64, layers=8)
    layout = layout_for(model)
    samples = [{key: tensor[:1, :4] for key, tensor in sample.items()} for sample in _samples(model)[:2]]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with Alive() as alive:
        fisher(model, layout, samples, _likelihood(model))
    assert alive.peak < 1.5 * whole  # activations, scores and one weight's squares in double; all gradients made it 3
    assert all(parameter.grad is None for parameter in model.parameters())
