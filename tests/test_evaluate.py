"""Option scores against a plain loop, one unpadded forward pass per option."""

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from conftest import FAMILIES, METHODS, VOCAB, make_model, make_tokenizer, randomise
from plugbridge.errors import NotFinite
from plugbridge.evaluate import log_likelihood, mean_loss, option_scores, predictions
from plugbridge.models import layout_for
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder, collate, gold
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import MethodSettings, find_method

KIND = {"gpt2": "causal", "llama": "causal", "t5": "seq2seq", "t5-gated": "seq2seq"}
EOS = VOCAB.index("</s>")


def rows_of(kind: str, lengths: list[tuple[int, ...]], seed: int = 0, opening: int = 0) -> list[Encoded]:
    """Random rows; `lengths` are those of every row's options, behind an opening that the row's options share."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, len(VOCAB), (count,), generator=generator).tolist())

    end = (EOS,) if kind == "seq2seq" else ()
    rows: list[Encoded] = []
    for i, counts in enumerate(lengths):
        prompt, start = (*tokens(1 + (5 * i) % 9), *end), tokens(opening)
        rows.append(Encoded(prompt, tuple((*start, *tokens(n), *end) for n in counts), i % len(counts)))
    return rows


def tuned(family: str, method: str | None) -> Any:
    """A model with a module on it, nothing at its no-op start."""
    model: Any = make_model(family)
    if method is not None:
        model, _ = attach(model, find_method(method), layout_for(model), MethodSettings(rank=2, alpha=4.0))
        randomise(model)
    return model.eval()


def naive(model: Any, kind: str, row: Encoded, option: tuple[int, ...], end: bool) -> float:
    """Mean log-probability of the option's tokens, with or without a seq2seq option's end mark."""
    if kind == "causal":
        logits = model(input_ids=torch.tensor([[*row.prompt, *option]])).logits[0, -len(option) - 1 : -1]
    else:
        logits = model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([option])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[torch.arange(len(option)), list(option)]
    return float((chosen if end or kind == "causal" else chosen[:-1]).mean())


class Plain(torch.nn.Module):
    """A network that is no Hugging Face model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


ONE = [(1, 1, 1)] * 9
SOME = [(1, 1), (2, 1), (3, 3, 1), (1, 1), (2, 4), (1, 2), (1, 1), (5, 2), (1, 1, 1, 3)]
ROWS = {"one token": (ONE, 0), "several tokens": (SOME, 0), "one opening": (SOME, 2), "all but the last": (ONE, 2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("shape", ROWS)
@torch.no_grad()
def test_scores_equal_a_plain_loop_whatever_the_batch(family: str, method: str | None, shape: str) -> None:
    kind, model, (lengths, opening) = KIND[family], tuned(family, method), ROWS[shape]
    rows = rows_of(kind, lengths, opening=opening)
    end = shape != "one token"  # among single tokens the end mark does not count
    expected = [[naive(model, kind, row, option, end) for option in row.options] for row in rows]
    encoder = Encoder(make_tokenizer(), kind, None)
    for batch_size in (1, 7, 100):
        found = option_scores(model, encoder, rows, batch_size, Silent(), "")
        assert predictions(found) == predictions(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, *METHODS])
@torch.no_grad()
def test_a_prompt_is_read_once(family: str, method: str | None) -> None:
    kind, model = KIND[family], tuned(family, method)
    rows = [Encoded((3, 4, 5, 6, 7, 8), ((9, 10, 11), (9, 12, 13), (9, 14, 15)), 0)] * 4
    read: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("wte", "embed_tokens")):
            module.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].numel()))
    option_scores(model, Encoder(make_tokenizer(), kind, None), rows, 100, Silent(), "")
    start = 1 if kind == "seq2seq" else 0  # the decoder's
    assert sum(read) == 4 * (6 + start + 1) + 4 * 3 * 1  # prompt, start and opening; one more token an option


@torch.no_grad()
def test_a_row_that_fills_all_positions_is_batched_with_longer_options() -> None:
    model = make_model("gpt2")  # 32 positions
    full = Encoded(tuple(range(3, 31)), ((3, 4), (4, 5, 6, 7)), 0)
    other = Encoded((3, 4), (tuple(range(3, 31)), (4,)), 0)
    found = option_scores(model, Encoder(make_tokenizer(), "causal", 32), [full, other], 100, Silent(), "")
    for row, ours in zip((full, other), found, strict=True):
        assert ours == pytest.approx([naive(model, "causal", row, option, True) for option in row.options], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("shape", ROWS)
@torch.no_grad()
def test_virtual_tokens_before_the_prompt_are_passed_over(family: str, shape: str) -> None:
    kind, (lengths, opening) = KIND[family], ROWS[shape]
    task = TaskType.CAUSAL_LM if kind == "causal" else TaskType.SEQ_2_SEQ_LM
    model = get_peft_model(make_model(family), PromptTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
    rows, end = rows_of(kind, lengths, opening=opening), shape != "one token"
    found = option_scores(model, Encoder(make_tokenizer(), kind, None), rows, 3, Silent(), "")
    for row, ours in zip(rows, found, strict=True):
        assert ours == pytest.approx([naive(model, kind, row, option, end) for option in row.options], abs=1e-5)


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


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("kind", [None, "gpt2", "t5"])
@pytest.mark.parametrize(("value", "said"), [(torch.nan, "nan"), (torch.inf, "nan"), (-torch.inf, "(nan|-inf)")])
def test_scores_that_are_not_finite_are_no_answers(kind: str | None, shape: str, value: float, said: str) -> None:
    model: Any = make_model(kind or "gpt2")
    lengths, opening = ROWS[shape]
    rows = rows_of(KIND[kind or "gpt2"], lengths, opening=opening)
    token = rows[4].options[1][-1 if kind != "t5" else -2]

    def broken(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] = value
        return logits

    model.get_output_embeddings().register_forward_hook(broken)
    encoder = Encoder(make_tokenizer(), KIND[kind or "gpt2"], None)
    with pytest.raises(NotFinite, match=f"^evaluate it: an option's score is {said}$"):
        option_scores(model if kind else Plain(model), encoder, rows, 4, Silent(), "evaluate it")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_head_is_one_product_for_all_rows(family: str) -> None:
    """States that are not contiguous make it one product a row, each with a copy of a bfloat16 head."""
    model, whole = tuned(family, None), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, given: whole.append(given[0].is_contiguous()))
    encoder = Encoder(make_tokenizer(), "causal", None)
    rows = [rows_of("causal", [(1, 1), (1, 1)])[1]] * 3
    option_scores(model, encoder, rows, 4, Silent(), "")
    mean_loss(model, gold(encoder, rows), "causal")
    assert whole == [True, True]
