"""Squared gradients of embeddings and heads, without the gradients."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import FAMILIES, make_model, token_inputs
from plugbridge.memory.case import Case
from plugbridge.memory.predict import predict
from plugbridge.memory.shapes import gpt2
from plugbridge.memory.steps import STEPS
from plugbridge.models import layout_for
from plugbridge.shrink.importance import fisher
from plugbridge.shrink.stream_fisher import streamed_fisher
from plugbridge.shrink.vocabulary import add_squares, vocabulary_modules, watched


def _sample(model) -> dict[str, torch.Tensor]:
    """A row with tokens that come twice, the padding token among them."""
    sample = token_inputs(model, rows=1, length=8)
    sample["attention_mask"].fill_(1)
    sample["input_ids"][0, :] = torch.tensor([5, 0, 7, 5, 0, 9, 7, 5])
    return sample


def _value(model, sample) -> torch.Tensor:
    """A value that several positions' logits have a part in."""
    log = torch.log_softmax(model(**sample).logits[0], -1)
    return log[-1, 4] + 2 * log[-2, 5] - log[0, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_autograd(family: str) -> None:
    model = make_model(family).double()
    layout = layout_for(model)
    covered = vocabulary_modules(model, layout)
    weights = {id(m.get_parameter("weight")): m.get_parameter("weight") for m in covered.values()}
    whole = torch.autograd.grad(_value(model, _sample(model)), list(weights.values()))
    wanted = sum(gradient.square().sum(0) for gradient in whole)
    model.requires_grad_(False)
    for norm in layout.norms():
        model.get_submodule(norm).requires_grad_(True)
    with watched(model, layout) as uses:
        value = _value(model, _sample(model))
        gradients = torch.autograd.grad(value, [tensor for use in uses.values() for tensor in use.tensors()])
        scores: dict[str, torch.Tensor] = {}
        add_squares(scores, layout, list(uses.values()), gradients)
    assert set(uses) == set(weights)
    assert torch.allclose(scores["hidden"], wanted, rtol=1e-10)
    model(**_sample(model))
    assert sum(len(use.heads) for use in uses.values()) == 1  # no longer watched


def test_a_head_that_is_not_covered_is_left_to_autograd() -> None:
    model = make_model("llama").double()
    layout = layout_for(model)
    assert set(vocabulary_modules(model, layout)) == {"lm_head.weight", "model.embed_tokens.weight"}
    model.get_input_embeddings().max_norm = 100.0
    assert set(vocabulary_modules(model, layout)) == {"lm_head.weight"}
    samples = [_sample(model)]
    wanted = fisher(model, layout, samples, lambda sample: _value(model, sample))
    found = streamed_fisher(model, layout, samples, lambda sample: _value(model, sample), 1)
    for key, values in wanted.items():
        assert torch.allclose(found[key], values, rtol=1e-9), key
    model.lm_head = nn.Linear(16, model.config.vocab_size).double()
    assert vocabulary_modules(model, layout) == {}


def test_a_tied_weight_is_covered_with_all_its_readers_or_not_at_all() -> None:
    model = make_model("gpt2").double()
    layout = layout_for(model)
    assert set(vocabulary_modules(model, layout)) == {"lm_head.weight", "transformer.wte.weight"}
    model.get_input_embeddings().max_norm = 100.0
    assert vocabulary_modules(model, layout) == {}
    samples = [_sample(model)]
    wanted = fisher(model, layout, samples, lambda sample: _value(model, sample))
    found = streamed_fisher(model, layout, samples, lambda sample: _value(model, sample), 1)
    for key, values in wanted.items():
        assert torch.allclose(found[key], values, rtol=1e-9), key


def test_a_large_vocabulary_takes_no_more_than_its_weights() -> None:
    case = Case(gpt2(64, 4, 1, 50000, 32), 1, 16, streamed=True, at_once=0)
    small = replace(case, config=gpt2(64, 4, 1, 1000, 32))
    more = predict(case, STEPS["score"]).peak - predict(small, STEPS["score"]).peak
    assert more < 1.1 * 4 * 49000 * 64
