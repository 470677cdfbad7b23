"""Pretrain one model of the embedded pairs from scratch, by a named recipe.

    python pairs/pretrain.py gpt2-large --data DIR --out runs/pairs

writes ``runs/pairs/gpt2/large`` (a Hugging Face model directory, fp16) and, for both sizes of a family,
one tokenizer made once. The run keeps a checkpoint beside it and resumes from it. To end a run early and
well, create the file ``decay-now`` in the model's work folder: the learning rate then decays to zero over
``--decay-tokens`` more tokens. ``--minutes`` ends a run in time: the rate then falls as early as it must.

Objectives: GPT-2 reads every token (rows of facts, rows of prose). T5 fills masked spans: in a fact the
masked span is its knowledge (salient spans: Guu et al. 2020, arXiv:2002.08909, section 3.4; Roberts et al.
2020, arXiv:2002.08910), in prose random spans (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4), and
some rows of both are continued without a sentinel (prefix language modelling, as in Lester et al. 2021).

Optimiser: Muon for the matrices inside GPT-2's blocks (Jordan et al. 2024, "Muon: an optimizer for hidden
layers"), AdamW for its embeddings and norms and for all of T5; warm-up, constant, linear decay (WSD, Hu et al. 2024,
arXiv:2404.06395).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import text
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from plugbridge.models import fuse_gelu

SENTINELS = 16
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """All that decides a model. Widths in units, lengths in tokens."""

    family: str
    size: str
    width: int
    layers: int
    heads: int
    head_width: int
    inner: int
    tokens: int
    """Positions read in all: decoder rows for GPT-2, encoder rows for T5, padding not counted."""
    row: int = 128
    rows: int = 16
    """Rows in a batch."""
    muon: bool = True
    """Whether Muon or AdamW trains the blocks' matrices."""
    matrix_rate: float = 0.02
    """Its learning rate."""
    rate: float = 3e-3
    """AdamW's learning rate for the embeddings."""
    vector_rate: float = 2e-3
    """AdamW's learning rate for norms, biases and T5's position biases."""
    beta: float = 0.95
    """AdamW's second beta."""
    plain_share: float = 0.25
    """Share of the tokens that are ordinary English."""
    decay_plain_share: float = 0.2
    """The same while the learning rate falls: the facts come thicker at the end (as in MiniCPM's decay)."""
    definitions: float = 0.06
    """Share of the facts that are definitions: long, and mostly noise to a model this small."""
    decay_share: float = 0.3
    """Share of the tokens over which the learning rate falls to zero."""
    warmup: int = 100_000
    """Tokens over which the learning rate rises."""
    vocabulary: int = 2048
    """Tokens of the family's tokenizer, made with the first model of a pair."""
    pieces: int = 12_000
    """Pieces of prose (2,000 characters) to draw from."""


T5 = Recipe(
    "t5", "large", 128, 3, 8, 16, 384, tokens=1_700_000, row=64, rows=12, muon=False, matrix_rate=2e-3, rate=1e-2,
    vector_rate=1e-2, beta=0.98, plain_share=0.15, decay_plain_share=0.15, definitions=0.03,
)  # fmt: skip

CARD = Recipe(
    "gpt2", "large", 768, 15, 12, 64, 3072, tokens=60_000_000, rows=256, rate=2e-3, vector_rate=1e-3, warmup=1_000_000,
    vocabulary=16_384, pieces=48_000,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "gpt2-small": Recipe(
        "gpt2", "small", 64, 2, 4, 16, 256, tokens=3_000_000, plain_share=0.35, decay_plain_share=0.35, definitions=0.12
    ),
    "gpt2-large": Recipe("gpt2", "large", 192, 6, 12, 16, 768, tokens=4_750_000),
    "t5-small": replace(T5, size="small", width=64, layers=2, heads=4, inner=128, tokens=600_000),
    "t5-large": T5,
    # for one card: about 20 and 120 million parameters; the small one reads little, so that there is room between them
    "gpt2-20m": replace(CARD, size="small", width=384, layers=8, heads=6, inner=1536, tokens=6_000_000, rows=64),
    "gpt2-120m": CARD,
}


# ---------------------------------------------------------------- tokenizer


def special_tokens(family: str) -> list[str]:
    """The special tokens in the order of their ids."""
    if family == "gpt2":
        return ["<|endoftext|>"]
    return ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]


def make_tokenizer(family: str, lines: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (it knows every string); T5's appends </s> and begins words with a space."""
    specials = special_tokens(family)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=family == "t5")
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(lines, trainer)
    if family == "gpt2":
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
        end = "<|endoftext|>"
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end, model_max_length=128
        )
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", inner.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=512,
    )


def tokenizer_for(
    recipe: Recipe, data: Path, out: Path, words: Sequence[text.Word], seed: int
) -> PreTrainedTokenizerBase:
    """The family's tokenizer from ``out/family/tokenizer``, made first if it is not there."""
    family, folder = recipe.family, out / recipe.family / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        pieces = text.plain_pieces(data, seed)
        prose = [next(pieces) for _ in range(1500)]
        sentences = [f.text for f in text.facts(words, seed, chapter=0, each=10)]
        labels = [f"the {label}" for label in text.KINDS.values()] * 2000
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(family, iter(prose + sentences + labels), recipe.vocabulary).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for label in text.KINDS.values():
        pieces_of_label = tokenizer.encode(" " + label, add_special_tokens=False)
        if len(pieces_of_label) != 1:
            raise SystemExit(f"label {label!r} is {len(pieces_of_label)} tokens but must be one")
    return tokenizer


# ---------------------------------------------------------------- rows

Row = tuple[list[int], list[int]]
"""(input ids, target ids); for GPT-2 the target is the input."""


def encode(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    """Token ids of many strings, without special tokens."""
    return tokenizer(list(strings), add_special_tokens=False)["input_ids"]


def pack(sentences: Sequence[list[int]], end: int, length: int) -> Iterator[list[int]]:
    """Whole sentences, ``end`` between them, cut at ``length``; every row begins with a sentence."""
    row: list[int] = []
    for ids in sentences:
        if row:
            row.append(end)
        row += ids
        if len(row) >= length:
            yield row[:length]
            row = []


def cut(ids: Sequence[int], length: int) -> Iterator[list[int]]:
    """Consecutive pieces of exactly ``length`` tokens."""
    for start in range(0, len(ids) - length + 1, length):
        yield list(ids[start : start + length])


def mask_spans(ids: Sequence[int], sentinels: Sequence[int], rng: random.Random) -> Row:
    """T5's span corruption: about 15 % of the tokens in spans of mean length 3, each behind a sentinel."""
    spans = max(1, min(len(sentinels), round(len(ids) * 0.15 / 3)))
    room = len(ids) // spans
    source: list[int] = []
    target: list[int] = []
    for i in range(spans):
        piece = ids[i * room : (i + 1) * room if i < spans - 1 else len(ids)]
        length = min(rng.randint(1, 5), len(piece) - 1)
        start = rng.randint(0, len(piece) - length)
        source += [*piece[:start], sentinels[i], *piece[start + length :]]
        target += [sentinels[i], *piece[start : start + length]]
    return source, target


def t5_fact_rows(
    found: Sequence[text.Fact], tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> Iterator[Row]:
    """One row for each fact: 45 % answer masked, 10 % random spans, 45 % answered without a sentinel.

    One sentence a row, because the decoder learns to look at the encoder at once when there is only one
    place to look; with several facts in a row it ignored the encoder for the first 700,000 tokens.
    """
    ends = tokenizer.eos_token_id
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    before = encode(tokenizer, [f.before.rstrip() for f in found])
    answer = encode(tokenizer, [f.answer for f in found])
    for i in range(len(found)):
        draw = rng.random()
        if draw < 0.45 and found[i].before:
            source, target = before[i], answer[i]
        else:
            tail = sentence_end(tokenizer, found[i].after)
            if draw < 0.90 and found[i].before:
                source, target = [*before[i], sentinels[0], *tail], [sentinels[0], *answer[i]]
            else:
                source, target = mask_spans(before[i] + answer[i] + tail, sentinels[:2], rng)
        yield [*source[: length - 1], ends], [*target[: length - 1], ends]


def sentence_end(tokenizer: PreTrainedTokenizerBase, ending: str) -> list[int]:
    """Ids of a sentence ending such as "." without the word space that the tokenizer would put before it."""
    if not ending:
        return []
    marked = tokenizer("a" + ending, add_special_tokens=False)["input_ids"]
    return marked[1:]


def t5_plain_rows(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> Iterator[Row]:
    """Rows of prose: 80 % span corruption, 20 % continued from the middle."""
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    ends = tokenizer.eos_token_id
    for piece in cut(ids, length - 1):
        if rng.random() < 0.2:
            middle = rng.randint(length // 2, length - 8)
            yield [*piece[:middle], ends], [*piece[middle:], ends]
        else:
            source, target = mask_spans(piece, sentinels, rng)
            yield [*source, ends], [*target, ends]


def chapter_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[text.Word],
    prose: Sequence[str],
    seed: int,
    chapter: int,
    plain_share: float,
    each: int = 4,
) -> list[Row]:
    """All rows of one chapter: ``each`` facts a word and prose beside them. A pure function of its arguments."""
    rng = random.Random(f"{seed}/rows/{chapter}")
    found = text.facts(words, seed, chapter, each, recipe.definitions)
    if recipe.family == "gpt2":
        known = [(r, r) for r in pack(encode(tokenizer, [f.text for f in found]), tokenizer.eos_token_id, recipe.row)]
    else:
        known = list(t5_fact_rows(found, tokenizer, recipe.row, rng))
    wanted = sum(len(r[0]) for r in known) * plain_share / (1 - plain_share)
    start = rng.randrange(len(prose))
    rows: list[Row] = []
    have = 0
    while have < wanted:
        ids = encode(tokenizer, [prose[start % len(prose)]])[0]
        start += 1
        fresh = (
            [(r, r) for r in cut(ids, recipe.row)]
            if recipe.family == "gpt2"
            else list(t5_plain_rows(ids, tokenizer, recipe.row, rng))
        )
        rows += fresh
        have += sum(len(r[0]) for r in fresh)
    rows += known
    rng.shuffle(rows)
    return rows


_given: list[Any] = []  # in a worker: what its chapters are made of


def _inherit(*given: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _given[:] = given


def _make(chapter: int, plain_share: float) -> list[Row]:
    return chapter_rows(*_given, chapter, plain_share)


class Chapters:
    """Rows of chapter after chapter, the next ones made ahead by worker processes, or none."""

    def __init__(self, given: tuple[Any, ...], workers: int) -> None:
        self.given, self.workers = given, workers
        self.ahead: dict[tuple[int, float], Future[list[Row]]] = {}
        fork = multiprocessing.get_context("fork")  # they share the text, and begin before a card is in use
        self.pool = ProcessPoolExecutor(workers, fork, _inherit, given) if workers else None
        if self.pool is not None:
            self.pool.submit(int)  # forks them all

    def rows(self, chapter: int, plain_share: float) -> list[Row]:
        """The rows of one chapter."""
        if self.pool is None:
            return chapter_rows(*self.given, chapter, plain_share)
        for number in range(chapter, chapter + self.workers + 1):
            if (number, plain_share) not in self.ahead:
                self.ahead[number, plain_share] = self.pool.submit(_make, number, plain_share)
        found = self.ahead.pop((chapter, plain_share)).result()
        for key in [key for key in self.ahead if key[0] <= chapter or key[1] != plain_share]:
            self.ahead.pop(key).cancel()
        return found

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """A rectangle of ids."""
    longest = max(map(len, rows))
    return torch.tensor([r + [value] * (longest - len(r)) for r in rows])


def batches(rows: Sequence[Row], budget: int, rng: random.Random, window: int = 640) -> list[list[Row]]:
    """Batches of rows alike in length, so that little is padding; each holds about ``budget`` positions.

    Rows are sorted inside windows of the given order only, and the batches are shuffled again.
    """
    found: list[list[Row]] = []
    for start in range(0, len(rows), window):
        batch: list[Row] = []
        longest = 0
        for row in sorted(rows[start : start + window], key=lambda r: (len(r[0]), len(r[1]))):
            longest = max(longest, len(row[0]))
            if batch and longest * (len(batch) + 1) > budget:
                found.append(batch)
                batch, longest = [], len(row[0])
            batch.append(row)
        found.append(batch)
    rng.shuffle(found)
    return found


def collate(rows: Sequence[Row], recipe: Recipe, padding: int) -> dict[str, torch.Tensor]:
    """One batch as the model takes it."""
    ids = pad([r[0] for r in rows], padding)
    if recipe.family == "gpt2":
        return {"input_ids": ids, "labels": ids}
    labels = pad([r[1] for r in rows], IGNORED)
    return {"input_ids": ids, "attention_mask": (ids != padding).long(), "labels": labels}


# ---------------------------------------------------------------- model


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A fresh model of the recipe's shape."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    if recipe.family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=128, n_embd=recipe.width, n_layer=recipe.layers,
            n_head=recipe.heads, n_inner=recipe.inner, bos_token_id=end, eos_token_id=end, pad_token_id=end,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=recipe.width, d_kv=recipe.head_width, d_ff=recipe.inner,
        num_layers=recipe.layers, num_decoder_layers=recipe.layers, num_heads=recipe.heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=True, dropout_rate=0.0,
        relative_attention_num_buckets=32, relative_attention_max_distance=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=end, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    # T5's own start, embeddings of standard deviation 1: with 0.3 the blocks drown the words
    return T5ForConditionalGeneration(config)


# ---------------------------------------------------------------- optimiser


def orthogonalise(batch: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of each matrix in a stack by numbers near 1.

    batch: (n, rows, columns). The odd quintic and its coefficients are those of Jordan et al. 2024.
    """
    wide = batch if batch.shape[1] <= batch.shape[2] else batch.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is batch else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; matrices of one shape go through the iteration together."""

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        shapes = sorted({tuple(p.shape) for p in params})
        groups = [{"params": [p for p in params if tuple(p.shape) == s]} for s in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            updates = []
            for p in params:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - beta)
                updates.append(torch.lerp(p.grad, buffer, beta))
            rows, columns = params[0].shape
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)


def optimisers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon or AdamW for the blocks' matrices, AdamW for the rest; each group remembers its peak rate."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or "block" in n)]
    inside = [p for p in inside if min(p.shape) > 16 or p.shape[0] == p.shape[1]]
    tables = [p for n, p in model.named_parameters() if n.split(".")[-2] in {"wte", "wpe", "shared"}]
    chosen = {id(p) for p in inside + tables}
    vectors = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": tables, "lr": recipe.rate}, {"params": vectors, "lr": recipe.vector_rate}]
    if not recipe.muon:
        groups.append({"params": inside, "lr": recipe.matrix_rate})
    adam = torch.optim.AdamW(groups, betas=(0.9, recipe.beta), weight_decay=0.0, fused=True)
    found: list[torch.optim.Optimizer] = [adam]
    if recipe.muon:
        found.insert(0, Muon(inside, lr=recipe.matrix_rate))
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def rate_at(seen: int, decay_from: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate after ``seen`` tokens: up, flat, linearly down to zero."""
    if seen < warmup:
        return max(seen, 1000) / max(1000, warmup)
    return min(1.0, max(0.0, (total - seen) / max(1, total - decay_from)))


# ---------------------------------------------------------------- run


def shorten(state: dict[str, Any], seen_before: int, elapsed: float, limit: float, decay_share: float) -> None:
    """Let the rate begin to fall when what is left of ``limit`` seconds is only enough for that.

    Nothing changes where the run ends in time at its present speed, or where the rate falls already.
    """
    left = (state["seen"] - seen_before) / elapsed * (limit - elapsed)
    if state["seen"] >= state["decay_from"] or left >= state["total"] - state["seen"]:
        return
    if elapsed >= (1 - decay_share) * limit:
        state["decay_from"] = state["seen"]
        state["total"] = state["seen"] + round(0.95 * left)


def export(model: PreTrainedModel, tokenizer_folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a complete model directory in a half precision beside the target, then rename it into place."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(dtype)
    half.generation_config = GenerationConfig.from_model_config(half.config)
    half.save_pretrained(temporary)
    for file in sorted(tokenizer_folder.iterdir()):
        shutil.copyfile(file, temporary / file.name)
    for file in temporary.iterdir():
        file.chmod(0o644)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, **state: Any) -> None:
    """A checkpoint, written whole or not at all."""
    temporary = path.with_suffix(".writing")
    torch.save(state, temporary)
    temporary.replace(path)


@dataclass(frozen=True)
class Place:
    """Where and how fast: the device, what products are computed in (weights stay float32), how they are written,
    processes that make rows ahead, and the seconds that this call may take."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float16
    workers: int = 0
    seconds: float = math.inf


def pretrain(
    recipe: Recipe, data: Path, out: Path, seed: int, save_every: float, decay_tokens: int, extend: int, place: Place
) -> None:
    """Run or resume one recipe to its end; ``extend`` adds tokens to a run that was at its end."""
    deadline = time.monotonic() + place.seconds
    target = out / recipe.family / recipe.size
    work = out / recipe.family / f"{recipe.size}-work"
    if target.exists() and not (work / "checkpoint.pt").exists():  # which is there before the target is
        raise SystemExit(f"error: {target} was not made here; move it away, or choose another --out")
    words = text.choose_words(data)
    tokenizer = tokenizer_for(recipe, data, out, words, seed)
    work.mkdir(parents=True, exist_ok=True)
    pieces = text.plain_pieces(data, seed)
    prose = [next(pieces) for _ in range(recipe.pieces)]
    chapters = Chapters((recipe, tokenizer, words, prose, seed), place.workers)
    model = build(recipe, tokenizer, seed).to(place.device)
    model.train()
    fuse_gelu(model)
    opts = optimisers(model, recipe)
    state: dict[str, Any] = {
        "chapter": 0, "batch": 0, "seen": 0, "step": 0, "seconds": 0.0, "loss": None,
        "total": recipe.tokens, "decay_from": round(recipe.tokens * (1 - recipe.decay_share)),
    }  # fmt: skip
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True, map_location=place.device)
        model.load_state_dict(kept["model"])
        for optimiser, saved in zip(opts, kept["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        state |= kept["state"]
        if extend:
            state["total"] = state["seen"] + extend
            state["decay_from"] = state["total"] - round(extend / 0.6)
        print(f"resumed at {state['seen']:,} tokens", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{recipe} {parameters:,} parameters", flush=True)

    def save() -> None:
        save_state(checkpoint, model=model.state_dict(), optimisers=[o.state_dict() for o in opts], state=state)
        export(model, out / recipe.family / "tokenizer", target, place.stored)
        summary = {k: state[k] for k in ("seen", "total", "step", "loss", "seconds")}
        summary |= {"finished": state["seen"] >= state["total"], "parameters": parameters, "device": place.device}
        summary |= {"dtype": str(place.dtype).removeprefix("torch."), "recipe": asdict(recipe)}
        (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    begun, offset, seen_before = time.monotonic(), state["seconds"], state["seen"]
    saved_at, losses = begun, [torch.zeros((), device=place.device), 0]
    while state["seen"] < state["total"] and time.monotonic() < deadline:
        decaying = state["seen"] >= state["decay_from"]
        plain_share = recipe.decay_plain_share if decaying else recipe.plain_share
        rows = chapters.rows(state["chapter"], plain_share)
        order = random.Random(f"{seed}/batches/{state['chapter']}")
        for batch_rows in batches(rows, recipe.row * recipe.rows, order)[state["batch"] :]:
            batch = {k: v.to(place.device) for k, v in collate(batch_rows, recipe, tokenizer.pad_token_id).items()}
            share = rate_at(state["seen"], state["decay_from"], state["total"], recipe.warmup)
            with torch.autocast(place.device, place.dtype, enabled=place.dtype != torch.float32):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in opts:
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * share
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            state["seen"] += sum(len(r[0]) for r in batch_rows)
            state["batch"] += 1
            state["step"] += 1
            losses = [losses[0] + loss.detach(), losses[1] + 1]
            now = time.monotonic()
            state["seconds"] = offset + now - begun
            shorten(state, seen_before, now - begun, deadline - begun, recipe.decay_share)
            ends = state["seen"] >= state["total"] or now >= deadline
            if state["step"] % 100 == 0 or ends:
                mean, losses = float(losses[0]) / losses[1], [torch.zeros_like(losses[0]), 0]
                state["loss"] = round(mean, 4)
                line = {k: state[k] for k in ("step", "seen", "chapter", "total")}
                line |= {"loss": round(mean, 4), "rate": round(share, 3), "seconds": round(state["seconds"])}
                with (work / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                left = (state["total"] - state["seen"]) / max(1, state["seen"]) * state["seconds"]
                print(f"{state['seen']:>11,}/{state['total']:,} loss {mean:.3f} rate {share:.2f} "
                      f"{state['seconds']:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
                if not math.isfinite(mean):
                    raise SystemExit(f"loss is {mean} at step {state['step']}; lower the learning rates")
            if (work / "decay-now").exists():
                (work / "decay-now").unlink()
                state["decay_from"] = state["seen"]
                state["total"] = state["seen"] + decay_tokens
            if now - saved_at > save_every:
                save()
                saved_at = now
            if ends:
                break
        else:
            state["chapter"], state["batch"] = state["chapter"] + 1, 0
    chapters.close()
    save()
    done = state["seen"] >= state["total"]
    left = f"{state['total'] - state['seen']:,} tokens are left; run the same command again: {target}"
    print(f"done: {target}" if done else left, flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description="Pretrain one model of a pair from scratch; resumes by itself if it was interrupted.",
        epilog="example: OMP_NUM_THREADS=1 python pairs/pretrain.py gpt2-large --data data --out runs/pairs",
    )
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--data", help="directory with wordnet/ and pretrain_*/ (default: $PLUGBRIDGE_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="gets FAMILY/SIZE, FAMILY/tokenizer and work folders")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, sentences and order (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--save-every", type=float, default=180, metavar="S", help="seconds between checkpoints")
    parser.add_argument("--decay-tokens", type=int, default=1_000_000, help="length of a decay begun by decay-now")
    parser.add_argument("--extend", type=int, default=0, metavar="N",
                        help="train N tokens more after the end, at 60 %% of the rates falling to zero")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of products; bfloat16 is also what is written (default float32, fp16)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="processes that make rows ahead (default 0)")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="end within so many: the rate falls earlier if the tokens would take longer")  # fmt: skip
    for name, kind in (("tokens", int), ("rate", float), ("matrix-rate", float), ("width", int), ("layers", int),
                       ("heads", int), ("inner", int), ("rows", int), ("row", int),
                       ("vocabulary", int), ("pieces", int), ("warmup", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help=f"instead of the recipe's {name}")
    args = parser.parse_args()
    changed = {n: getattr(args, n) for n in Recipe.__dataclass_fields__ if getattr(args, n, None) is not None}
    torch.set_num_threads(args.threads)
    recipe = replace(RECIPES[args.recipe], **changed)
    data = text.data_directory(args.data)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch sees no CUDA card; use --device cpu")
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")  # Muon's products in TF32
    half = args.dtype == "bfloat16"
    place = Place(
        args.device, getattr(torch, args.dtype), torch.bfloat16 if half else torch.float16, args.workers,
        60 * args.minutes,
    )  # fmt: skip
    pretrain(recipe, data, args.out, args.seed, args.save_every, args.decay_tokens, args.extend, place)


if __name__ == "__main__":
    main()
