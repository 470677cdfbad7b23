"""The same choices and the same accuracy as lm-eval's scorer, from text to answer, where lm-eval is installed.

lm-eval sums an option's log-probability and chooses by the sum (`acc`); ours is the sum or the mean per token, and both
rules are applied to both. A seq2seq option's end mark,
which lm-eval does not add, is written behind the option for it; among single tokens ours does not count it either.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import data_directory
from plugbridge.evaluate import option_scores, predictions
from plugbridge.models import load_model, load_tokenizer, positions_of
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoder
from plugbridge.tasks.metrics import accuracy, chosen
from plugbridge.tasks.rows import Row, find_files, make_row, read_flat
from plugbridge.tasks.spec import Task, load_task

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

PAIRS = Path(__file__).parent.parent / "pairs"
KIND = {"gpt2": "causal", "t5": "seq2seq"}
TASKS = ("rte", "cb", "copa", "boolq")
WHO, DID, WHAT = (
    ("A dog", "The old man", "Rain", "A small bird"),
    ("found", "left", "made"),
    ("food", "a tree", "water"),
)
NOISE_SEED, NOISE = 0, 0.5  # of the weights, so that a choice depends on its row more than on its words
Score = Callable[[list[tuple[str, str]]], list[float]]


def made_up(name: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows with the fields of a task, of many lengths; their labels mean nothing."""
    draw = random.Random(7)
    labels = {"rte": ("entailment", "not_entailment"), "boolq": ("true", "false"), "copa": (0, 1)}
    labels["cb"] = ("entailment", "contradiction", "neutral")

    def text(most: int) -> str:
        parts = (f"{draw.choice(WHO)} {draw.choice(DID)} {draw.choice(WHAT)}" for _ in range(draw.randint(1, most)))
        return " and ".join(parts)

    return [
        {
            "premise": f"{text(5)}.", "hypothesis": text(1) + ("" if name == "cb" else "."),
            "passage": f"{text(5)}.", "question": text(1),
            "choice1": f"{text(1)}.", "choice2": f"{text(2)} now.", "label": draw.choice(labels[name]),
            **({"question": draw.choice(("cause", "effect"))} if name == "copa" else {}),
        }
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=list(KIND))
def scorers(request: pytest.FixtureRequest) -> tuple[Any, Encoder, Score]:
    """An embedded model, its encoder, and lm-eval's summed log-likelihoods of (context, continuation) under it."""
    source = str(PAIRS / request.param / "large")
    model, tokenizer = load_model(source), load_tokenizer(source)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)
    encoder = Encoder(tokenizer, KIND[request.param], positions_of(model.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend=encoder.kind, batch_size=5, device="cpu")

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [total for total, _ in theirs.loglikelihood(requests, disable_tqdm=True)]

    return model, encoder, score


def agree(task: Task, rows: list[Row], scorers: tuple[Any, Encoder, Score]) -> None:
    """Assert the same likelihoods, choices and accuracy."""
    model, encoder, score = scorers
    encoded = [encoder.encode(task, task.form(encoder.kind), row) for row in rows]
    ways = [[replace(row, score=rank) for row in encoded] for rank in ("sum", "mean")]
    ours, means = (option_scores(model, encoder, way, 7, Silent(), "") for way in ways)
    single = encoder.kind == "seq2seq" and all(len(option) == 1 for row in encoded for option in row.options)
    end = "</s>" if encoder.kind == "seq2seq" and not single else ""
    found = iter(score([(row.prompt, option + end) for row in rows for option in row.options]))
    sums = [[next(found) for _ in row.options] for row in rows]
    counts = [[1 if single else len(option) for option in row.options] for row in encoded]
    theirs = [[total / n for total, n in zip(*both, strict=True)] for both in zip(sums, counts, strict=True)]
    for mine, other in zip(ours, sums, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-4)
    for mine, other in ((means, theirs), (ours, sums)):
        assert predictions(mine) == predictions(other)
        shares = [
            accuracy([chosen(row, i) for row, i in zip(rows, predictions(s), strict=True)]) for s in (mine, other)
        ]
        assert shares[0] == shares[1]


@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_chooses_the_same(name: str, scorers: tuple[Any, Encoder, Score]) -> None:
    task = load_task(name)
    form = task.form(scorers[1].kind)
    agree(task, [make_row(task, form, f"row {i}", raw) for i, raw in enumerate(made_up(name))], scorers)


@pytest.mark.needs_data
@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_chooses_the_same_on_the_official_rows(name: str, scorers: tuple[Any, Encoder, Score]) -> None:
    task, encoder = load_task(name), scorers[1]
    path = find_files(task, data_directory(), {"test": task.files["test"]})["test"]
    rows = [make_row(task, task.form(encoder.kind), where, raw) for where, raw in read_flat(task, path)]
    short = [row for row in rows if len(encoder.text(row.prompt)) < 100]  # lm-eval cuts a long prompt elsewhere
    assert short
    agree(task, short[:60], scorers)
