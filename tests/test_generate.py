"""Greedy texts against a plain loop, one unpadded forward pass a token, whatever the batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, VOCAB, make_model, make_tokenizer, randomise, save_model
from plugbridge.errors import NotFinite
from plugbridge.generate import generate_texts
from plugbridge.models import layout_for, load_model
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tuners.module import attach
from plugbridge.tuners.table import METHODS, MethodSettings

KIND = {"gpt2": "causal", "llama": "causal", "t5": "seq2seq", "t5-gated": "seq2seq"}
PAD, EOS = 0, 1


def rows_of(kind: str) -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    end = (EOS,) if kind == "seq2seq" else ()
    lengths = (1, 7, 3, 5, 2, 9, 4)
    prompts = [torch.randint(3, len(VOCAB), (n,), generator=generator).tolist() for n in lengths]
    return [Encoded((*prompt, *end), (), 0) for prompt in prompts]


@torch.no_grad()
def naive(model: Any, kind: str, prompt: tuple[int, ...], count: int) -> str:
    """The likeliest token, again and again, without a cache; without special tokens."""
    written: list[int] = []
    while len(written) < count and EOS not in written:
        if kind == "causal":
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits
        else:
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[PAD, *written]])).logits
        written.append(int(logits[0, -1].argmax()))
    return " ".join(VOCAB[token] for token in written if token > 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, "lora", "adapter", "prefix"])
def test_texts_equal_a_plain_loop_whatever_the_batch(family: str, method: str | None) -> None:
    kind, model = KIND[family], make_model(family)
    if method is not None:
        torch.manual_seed(5)
        model, _ = attach(model, METHODS[method], layout_for(model), MethodSettings(rank=2, alpha=4.0))
        randomise(model)
        model.eval()
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    expected = [naive(model, kind, row.prompt, 6) for row in rows]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 100):
        assert generate_texts(model, encoder, rows, 6, batch_size, Silent(), "") == expected


class Plain(torch.nn.Module):
    """A network without `generate`."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_without_a_cache_writes_the_same(family: str) -> None:
    kind, model = KIND[family], make_model(family)
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    for batch_size in (1, 3, 100):
        own = generate_texts(model, encoder, rows, 6, batch_size, Silent(), "")
        assert generate_texts(Plain(model), encoder, rows, 6, batch_size, Silent(), "") == own


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_mark_ends_a_text(family: str, plain: bool) -> None:
    kind, model = KIND[family], make_model(family)
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    calls = 0

    def end_at_the_third(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = logits.clone()
        logits[..., :3] = -1e9  # no special token, but for the end mark
        logits[..., EOS] = -1e9 if calls % 3 else 1e9
        return logits

    model.get_output_embeddings().register_forward_hook(end_at_the_third)
    together = generate_texts(Plain(model) if plain else model, encoder, rows, 6, 100, Silent(), "")
    assert calls == 3
    assert [len(text.split()) for text in together] == [2] * 7


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_write_nothing(family: str, plain: bool, value: float) -> None:
    kind, model = KIND[family], make_model(family)
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    calls = 0

    def broken(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = logits.clone()
        logits[..., EOS] = -torch.inf  # a token that is ruled out
        if calls == 3:
            logits[2] = value
        return logits

    model.get_output_embeddings().register_forward_hook(broken)
    with pytest.raises(NotFinite, match=f"^evaluate it: a likeliest token's logit is {value}$"):
        generate_texts(Plain(model) if plain else model, encoder, rows, 6, 100, Silent(), "evaluate it")
    assert calls == 3


HOSTILE: dict[str, Any] = {
    "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 9.0, "min_length": 20,
    "min_new_tokens": 5, "max_length": 2, "do_sample": True, "temperature": 0.1, "top_k": 1, "num_beams": 3,
    "num_return_sequences": 2, "forced_bos_token_id": 4, "forced_eos_token_id": 4, "suppress_tokens": [5, 6, 7, 8, 9],
    "begin_suppress_tokens": [10, 11, 12, 13, 14], "bad_words_ids": [[15], [16]], "sequence_bias": [[[17], -50.0]],
    "stop_strings": ["w"], "return_dict_in_generate": True, "output_scores": True, "eos_token_id": [3, 4, 5],
    "decoder_start_token_id": 7, "cache_implementation": "static", "guidance_scale": 3.0, "use_cache": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "hostile"),
    [(family, method, HOSTILE) for family in FAMILIES for method in (None, "lora", "prefix")]
    + [
        ("gpt2", None, {key: HOSTILE[key]}) for key in ("repetition_penalty", "stop_strings", "return_dict_in_generate")
    ],
)
def test_the_checkpoints_own_settings_of_writing_change_no_text(
    family: str, method: str | None, hostile: dict[str, Any]
) -> None:
    kind, model = KIND[family], make_model(family)
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    expected = [naive(model, kind, row.prompt, 6) for row in rows]
    for key, value in hostile.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config.to_dict()
    writer = model if method is None else attach(model, METHODS[method], layout_for(model), MethodSettings(2, 4.0))[0]
    found = generate_texts(writer.eval(), encoder, rows, 6, 3, Silent(), "")
    if method != "prefix":  # which is no no-op at its start
        assert found == expected
    assert generate_texts(Plain(writer), encoder, rows, 6, 3, Silent(), "") == found
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [json.dumps(HOSTILE), "[]", "{", '{"temperature": "warm"}'])
def test_a_checkpoints_own_settings_of_writing_are_not_read(family: str, text: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    model, kind = load_model(str(folder)), KIND[family]
    rows, encoder = rows_of(kind), Encoder(make_tokenizer(), kind, None)
    expected = [naive(model, kind, row.prompt, 6) for row in rows]
    assert generate_texts(model, encoder, rows, 6, 3, Silent(), "") == expected
    model.save_pretrained(tmp_path / "saved")  # settings that contradict each other could not be saved
