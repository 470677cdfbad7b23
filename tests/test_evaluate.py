"""Option scores against a plain loop, one unpadded forward pass per option."""

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from conftest import FAMILIES, VOCAB, make_model, make_tokenizer
from plugbridge.evaluate import log_likelihood, mean_loss, option_scores, predictions
from plugbridge.models import layout_for
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder, collate, gold
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import METHODS, MethodSettings

KIND = {"gpt2": "causal", "llama": "causal", "t5": "seq2seq", "t5-gated": "seq2seq"}
EOS = VOCAB.index("</s>")


def rows_of(kind: str, lengths: list[tuple[int, ...]], seed: int = 0) -> list[Encoded]:
    """Random rows; `lengths` are those of every row's options."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, len(VOCAB), (count,), generator=generator).tolist())

    end = (EOS,) if kind == "seq2seq" else ()
    return [
        Encoded((*tokens(1 + (5 * i) % 9), *end), tuple((*tokens(n), *end) for n in counts), i % len(counts))
        for i, counts in enumerate(lengths)
    ]


def naive(model: Any, kind: str, row: Encoded, option: tuple[int, ...], end: bool) -> float:
    """Mean log-probability of the option's tokens, with or without a seq2seq option's end mark."""
    if kind == "causal":
        logits = model(input_ids=torch.tensor([[*row.prompt, *option]])).logits[0, -len(option) - 1 : -1]
    else:
        logits = model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([option])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[torch.arange(len(option)), list(option)]
    return float((chosen if end or kind == "causal" else chosen[:-1]).mean())


ONE, SOME = [(1, 1, 1)] * 7, [(1, 1), (2, 1), (3, 3, 1), (1, 1), (2, 4), (1, 2), (1, 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, "prefix"])
@pytest.mark.parametrize("lengths", [ONE, SOME], ids=["one token", "several tokens"])
@torch.no_grad()
def test_scores_equal_a_plain_loop_whatever_the_batch(
    family: str, method: str | None, lengths: list[tuple[int, ...]]
) -> None:
    kind, model = KIND[family], make_model(family)
    if method is not None:
        torch.manual_seed(5)
        model, _ = attach(model, METHODS[method], layout_for(model), MethodSettings(rank=2, alpha=4.0))
        model.eval()
    rows = rows_of(kind, lengths)
    end = lengths is SOME  # among single tokens the end mark does not count
    expected = [[naive(model, kind, row, option, end) for option in row.options] for row in rows]
    encoder = Encoder(make_tokenizer(), kind, None)
    for batch_size in (1, 3, 100):
        found = option_scores(model, encoder, rows, batch_size, Silent(), "")
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("lengths", [ONE, SOME], ids=["one token", "several tokens"])
@torch.no_grad()
def test_logits_of_virtual_tokens_are_passed_over(lengths: list[tuple[int, ...]]) -> None:
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(make_model("gpt2"), settings).eval()
    rows = rows_of("causal", lengths)
    found = option_scores(model, Encoder(make_tokenizer(), "causal", None), rows, 3, Silent(), "")
    for row, ours in zip(rows, found, strict=True):
        assert ours == pytest.approx([naive(model, "causal", row, option, False) for option in row.options], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mean_loss_is_the_models_own_loss(family: str) -> None:
    kind, model = KIND[family], make_model(family)
    encoder = Encoder(make_tokenizer(), kind, None)
    batch = gold(encoder, rows_of(kind, SOME))
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert float(mean_loss(model, batch, kind)) == pytest.approx(float(own), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_changes_no_likelihood(family: str) -> None:
    kind, model = KIND[family], make_model(family)
    encoder = Encoder(make_tokenizer(), kind, None)
    pairs = [(row.prompt, row.options[0]) for row in rows_of(kind, SOME)]
    alone = torch.cat([log_likelihood(model, collate(encoder, [pair]), kind) for pair in pairs])
    together = log_likelihood(model, collate(encoder, pairs), kind)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_likeliest_option_wins_and_the_first_of_equals() -> None:
    assert predictions([[-1.0, -0.5, -2.0], [-1.0, -1.0], [-3.0]]) == [1, 0, 0]
