"""Option scores against a plain loop, one unpadded forward pass per option."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from conftest import FAMILIES, METHODS, VOCAB, make_model, make_tokenizer, randomise
from plugbridge.config.inputs import Score
from plugbridge.errors import NotFinite
from plugbridge.evaluate import log_likelihood, mean_loss, option_scores, predictions
from plugbridge.models import layout_for
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder, collate, gold
from plugbridge.train import shares
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import MethodSettings, find_method

KIND = {"gpt2": "causal", "llama": "causal", "t5": "seq2seq", "t5-gated": "seq2seq"}
EOS = VOCAB.index("</s>")


def rows_of(kind: str, lengths: list[tuple[int, ...]], seed: int = 0, opening: int = 0) -> list[Encoded]:
    """Random rows; `lengths` are those of every row's options, behind an opening that the row's options share."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, len(VOCAB), (count,), generator=generator).tolist())

    mark = (EOS,) if kind == "seq2seq" else ()
    rows: list[Encoded] = []
    for i, counts in enumerate(lengths):
        prompt, start = (*tokens(1 + (5 * i) % 9), *mark), tokens(opening)
        end = mark if opening + max(counts) > 1 else ()  # single tokens have none
        rows.append(Encoded(prompt, tuple((*start, *tokens(n), *end) for n in counts), i % len(counts)))
    return rows


def tuned(family: str, method: str | None) -> Any:
    """A model with a module on it, nothing at its no-op start."""
    model: Any = make_model(family)
    if method is not None:
        model, _ = attach(model, find_method(method), layout_for(model), MethodSettings(rank=2, alpha=4.0))
        randomise(model)
    return model.eval()


def naive(model: Any, kind: str, row: Encoded, option: tuple[int, ...]) -> float:
    """What an option is ranked by."""
    if kind == "causal":
        logits = model(input_ids=torch.tensor([[*row.prompt, *option]])).logits[0, -len(option) - 1 : -1]
    else:
        logits = model(input_ids=torch.tensor([row.prompt]), labels=torch.tensor([option])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[torch.arange(len(option)), list(option)]
    return float({"sum": chosen.sum(), "mean": chosen.mean(), "first": chosen[0]}[row.score])


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
    encoder = Encoder(make_tokenizer(), kind, None)
    for batch_size, rank in ((1, "first"), (7, "sum"), (100, "mean")):
        rows = [replace(row, score=rank) for row in rows]
        expected = [[naive(model, kind, row, option) for option in row.options] for row in rows]
        found = option_scores(model, encoder, rows, batch_size, Silent(), "")
        if rank != "first":  # options that share their opening are equals there
            assert predictions(found) == predictions(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("network", [lambda model: model, Plain])
@torch.no_grad()
def test_a_row_is_scored_alike_whatever_rows_are_beside_it(network: Any) -> None:
    model, encoder = network(tuned("t5", None)), Encoder(make_tokenizer(), "seq2seq", None)
    single, longer = rows_of("seq2seq", ONE), rows_of("seq2seq", [(1, 2)], seed=1)
    alone = option_scores(model, encoder, single, 4, Silent(), "")
    beside = option_scores(model, encoder, [*single, *longer], 4, Silent(), "")
    for ours, theirs in zip(beside, alone, strict=False):
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
        assert ours == pytest.approx([naive(model, "causal", row, option) for option in row.options], rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("shape", ROWS)
@torch.no_grad()
def test_virtual_tokens_before_the_prompt_are_passed_over(family: str, shape: str) -> None:
    kind, (lengths, opening) = KIND[family], ROWS[shape]
    task = TaskType.CAUSAL_LM if kind == "causal" else TaskType.SEQ_2_SEQ_LM
    model = get_peft_model(make_model(family), PromptTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
    rows = rows_of(kind, lengths, opening=opening)
    found = option_scores(model, Encoder(make_tokenizer(), kind, None), rows, 3, Silent(), "")
    for row, ours in zip(rows, found, strict=True):
        assert ours == pytest.approx([naive(model, kind, row, option) for option in row.options], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mean_loss_is_the_models_own_loss(family: str) -> None:
    kind, model = KIND[family], make_model(family)
    encoder = Encoder(make_tokenizer(), kind, None)
    batch = gold(encoder, [replace(row, options=(row.target,), answer=0) for row in rows_of(kind, SOME)])
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert float(mean_loss(model, batch, kind)) == pytest.approx(float(own), abs=1e-6)


@pytest.mark.parametrize("rank", ["sum", "mean", "first"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_training_raises_what_choices_are_made_on(family: str, rank: Score) -> None:
    """The gradient of a batch is that of the right options' scores, each row as often; in parts it is the same."""
    kind, model = KIND[family], make_model(family).double()
    lengths = [(2, 4), (3, 4), (4, 4), (4, 3)]  # as of label words: the longest is the same in every row
    rows = [replace(row, score=rank) for row in rows_of(kind, lengths)]
    encoder, parameters = Encoder(make_tokenizer(), kind, None), list(model.parameters())

    def direction(total: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    def score_of(row: Encoded) -> torch.Tensor:
        target = row.options[row.answer][: 1 if rank == "first" else None]
        value = log_likelihood(model, collate(encoder, [(row.prompt, target)]), kind).sum()
        return value / len(target) if rank == "mean" else value

    whole = mean_loss(model, gold(encoder, rows), kind)
    longest = 4 + (kind == "seq2seq") if rank == "sum" else 1
    wanted = -torch.stack([score_of(row) for row in rows]).mean() / longest
    torch.testing.assert_close(whole, wanted)
    torch.testing.assert_close(direction(whole), direction(wanted))
    parts = [
        mean_loss(model, gold(encoder, part), kind) * share for part, share in shares(rows, 3, lambda row: row.weight)
    ]
    torch.testing.assert_close(sum(parts), wanted)
    scores = option_scores(model, encoder, [replace(row, options=(row.options[row.answer],)) for row in rows], 3,
                           Silent(), "")  # fmt: skip
    assert float(whole.detach()) * longest == pytest.approx(-sum(row[0] for row in scores) / len(rows))


def test_single_tokens_are_trained_as_ever() -> None:
    """Where words are single tokens, nothing is weighed: the loss is the mean over tokens, bit for bit."""
    for kind in ("causal", "seq2seq"):
        for rank in ("sum", "mean"):
            rows = [replace(row, score=rank) for row in rows_of(kind, ONE)]
            assert gold(Encoder(make_tokenizer(), kind, None), rows).weights is None


def test_the_sum_chooses_where_the_mean_is_misled_by_late_pieces() -> None:
    """A word of one likely token against a word whose later tokens are nearly certain."""
    found = {}
    for rank in ("sum", "mean", "first"):
        row = Encoded((3,), ((4,), (5, 6, 7)), 0, score=rank)
        found[rank] = predictions(option_scores(_certain(), Encoder(make_tokenizer(), "causal", None), [row], 4,
                                                Silent(), ""))  # fmt: skip
    assert found == {"sum": [0], "mean": [1], "first": [0]}


def _certain() -> Plain:
    """Token 4 has twice the odds of 5; 6 and 7 are certain after it."""
    table = torch.zeros(len(VOCAB), len(VOCAB))
    table[3, 4], table[3, 5], table[5, 6], table[6, 7] = 2.0, 1.3, 50.0, 50.0

    class Bigrams(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(table)

        def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | None = None, **_: Any) -> Any:
            logits = self.table[input_ids]
            return SimpleNamespace(logits=logits if logits_to_keep is None else logits[:, logits_to_keep])

    return Plain(Bigrams())


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
    token = [token for token in rows[4].options[1] if token != EOS][-1]

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
