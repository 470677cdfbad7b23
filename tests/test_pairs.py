"""The embedded models: small enough to ship, one tokenizer a family, and label words that are one token."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from plugbridge.models import layout_for, load_model, parameter_count
from plugbridge.tasks.rows import load_rows
from plugbridge.tasks.spec import SPLITS, load_task

PAIRS = Path(__file__).parent.parent / "pairs"
FAMILIES = ("gpt2", "t5")
sys.path.insert(0, str(PAIRS))
pretrain = importlib.import_module("pretrain")
LIMIT = 16_000_000


def test_all_pairs_together_fit_their_limit() -> None:
    files = [file for family in FAMILIES for file in (PAIRS / family).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LIMIT
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".model"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_two_models_of_one_family_with_one_tokenizer(family: str) -> None:
    small, large = (load_model(str(PAIRS / family / size)) for size in ("small", "large"))
    assert layout_for(small).family is layout_for(large).family
    assert parameter_count(large) > 5 * parameter_count(small)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (PAIRS / family / "small" / file).read_bytes() == (PAIRS / family / "large" / file).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["wordnet-kind", "wordnet-kind-moved"])
def test_label_words_are_single_tokens_and_test_words_are_new(family: str, task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PAIRS / family / "small")
    kind = "seq2seq" if family == "t5" else "causal"
    rows = load_rows(load_task(task), kind, None, 0)
    for option in rows["test"][0].options:
        assert len(tokenizer.encode(option, add_special_tokens=False)) == 1, option
    words = {split: {row.fields["word"] for row in rows[split]} for split in SPLITS}
    synsets = {split: {row.fields["synset"] for row in rows[split]} for split in SPLITS}
    for seen in ("train", "validation"):
        assert not words["test"] & words[seen]
        assert not synsets["test"] & synsets[seen]
    assert len(rows["test"]) >= 1000


@pytest.mark.parametrize("beside", ["nothing", "an empty work folder"])
def test_a_model_that_was_not_pretrained_here_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    target = tmp_path / "out" / "gpt2" / "small"
    target.mkdir(parents=True)
    (target / "config.json").write_text("mine", encoding="utf-8")
    if beside != "nothing":
        target.with_name("small-work").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["pretrain.py", "gpt2-small", "--data", str(tmp_path), "--out", str(target.parents[1])]
    )
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match=rf"^error: {target} was not made here; move it away, or choose ano"):
        pretrain.main()
    torch.set_num_threads(threads)
    assert sorted(tmp_path.rglob("*")) == before
    assert (target / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("elapsed", "limit", "seen", "falls"),
    [
        (10, 100, 100, False),  # 900 tokens more at this speed: too few, but there is time until the rate must fall
        (70, 100, 700, True),
        (70, 1000, 700, False),  # there is time for all
        (70, math.inf, 700, False),
    ],
)
def test_the_rate_falls_in_time_for_the_end(elapsed: float, limit: float, seen: int, falls: bool) -> None:
    state: dict[str, Any] = {"seen": seen, "total": 5000, "decay_from": 3500}
    pretrain.shorten(state, 0, elapsed, limit, 0.3)
    assert (state["decay_from"] == seen) == falls
    assert state["total"] == (seen + round(0.95 * 300) if falls else 5000)


def test_the_recipes_for_a_card_have_the_sizes_they_are_called_by() -> None:
    for name, millions in (("gpt2-20m", 20), ("gpt2-120m", 120)):
        r = pretrain.RECIPES[name]
        blocks = r.layers * (4 * r.width**2 + 2 * r.width * r.inner)
        assert (blocks + r.vocabulary * r.width) / 1e6 == pytest.approx(millions, rel=0.05)
