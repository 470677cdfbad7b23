"""Proxy-tuning: a large model's logits, and what tuning changed in a small one's, at every token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VOCAB, make_model, make_tokenizer, randomise
from plugbridge.evaluate import option_scores
from plugbridge.generate import generate_texts
from plugbridge.models import layout_for
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.transfer.proxy import ProxyTuned
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import METHODS as TABLE
from plugbridge.tuners.table import MethodSettings

GRID = [("gpt2", "lora", "sum"), ("t5", "prefix", "mean"), ("t5-gated", "lora", "sum"), ("llama", "adapter", "first")]
PROMPTS = ((8, 9, 10), (11, 12), (13,))


def _models(family: str, method: str) -> tuple[ProxyTuned, Any, Any, Any]:
    """The network, and the three models that it stands for, each by itself."""
    small, large = make_model(family, hidden=8, layers=1, heads=2, seed=1), make_model(family, seed=2)
    plain = make_model(family, hidden=8, layers=1, heads=2, seed=1)
    made = []
    for model in (small, make_model(family, hidden=8, layers=1, heads=2, seed=1)):
        wrapped, _ = attach(model, TABLE[method], layout_for(model), MethodSettings(rank=2, alpha=4.0))
        randomise(wrapped, std=1.0)
        made.append(wrapped.eval())
    return ProxyTuned(large, made[0]).eval(), large, made[1], plain


@torch.no_grad()
def _logits(models: list[Any], prompt: tuple[int, ...], written: tuple[int, ...]) -> Tensor:
    """Of what follows the prompt and each of the written tokens, one unpadded forward pass a model."""
    if models[0].config.model_type == "t5":
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *written]])}
        found = [model(**inputs).logits[0] for model in models]
    else:
        found = [model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 :] for model in models]
    large, tuned, untuned = found
    return large + tuned - untuned


@pytest.mark.parametrize(("family", "method", "score"), GRID)
def test_options_and_texts_are_of_the_sum_of_logits(family: str, method: str, score: Any) -> None:
    network, *models = _models(family, method)
    seq2seq = family.startswith("t5")
    end = (1,) if seq2seq else ()
    options = tuple((*option, *end) for option in ((3, 4), (4,), (20, 21, 22)))
    rows = [Encoded((*prompt, *end), options, 0, score=score) for prompt in PROMPTS]
    encoder = Encoder(make_tokenizer(), "seq2seq" if seq2seq else "causal", None)
    for row, scores in zip(rows, option_scores(network, encoder, rows, 2, Silent(), ""), strict=True):
        for option, found in zip(options, scores, strict=True):
            table = torch.log_softmax(_logits(models, row.prompt, option[:-1]), -1)
            values = table[torch.arange(len(option)), list(option)]
            wanted = {"sum": values.sum(), "mean": values.mean(), "first": values[0]}[score]
            assert found == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
    texts = []
    for row in rows:
        written: list[int] = []
        while len(written) < 4 and 1 not in written:
            written.append(int(_logits(models, row.prompt, tuple(written))[-1].argmax()))
        texts.append(" ".join(VOCAB[token] for token in written if token > 2))
    assert generate_texts(network, encoder, rows, 4, 3, Silent(), "") == texts
    assert generate_texts(models[0], encoder, rows, 4, 3, Silent(), "") != texts


def test_tokens_that_one_model_has_no_embedding_for_are_left_out() -> None:
    network, *_ = _models("gpt2", "lora")
    network.large.resize_token_embeddings(len(VOCAB) + 8, mean_resizing=False)
    inputs = {"input_ids": torch.tensor([[8, 9, 10]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert network(**inputs).logits.shape == (1, 3, len(VOCAB))


def test_in_half_precision_logits_are_added_in_float32() -> None:
    network, *_ = _models("gpt2", "lora")
    inputs = {"input_ids": torch.tensor([[8, 9, 10]])}
    found = network.to(torch.bfloat16)(**inputs).logits
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.to(torch.bfloat16).float())
