"""Judge a pair: how much better is the large model than the small one after LoRA tuning?

    python pairs/judge.py pairs/gpt2 --task src/plugbridge/tasks/data/wordnet-kind

For each prompt the small and the large model are scored zero-shot, then tuned with LoRA (Hu et al. 2021,
arXiv:2106.09685) on the train split. The learning rate is chosen on the validation split with the first
seed; the test split is read once for every seed, at the end. The number that counts is
room = accuracy(large tuned) - accuracy(small tuned).

The answer is the label word whose one token scores highest: at the last position of GPT-2's prompt, at the
first decoder position of T5 (which reads the prompt in its encoder).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

PROMPTS: dict[str, str] = {
    "readable": "The word is {word}:",
    "moved": "{word} is the word. The kind of thing it names is called",
}

TARGETS: dict[str, list[str]] = {"gpt2": ["c_attn"], "t5": ["q", "k", "v"]}
"""Where LoRA goes: the projections that read a layer's input into its attention."""

Example = tuple[list[int], int]
"""(prompt ids, index of the label)."""


def load(folder: Path) -> Any:
    """The model in fp32, in evaluation mode."""
    kind = AutoConfig.from_pretrained(folder).model_type
    loader = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of one split."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(rows: Sequence[dict[str, str]], prompt: str, tokenizer: Any, labels: Sequence[str]) -> list[Example]:
    """Rows as token ids and label indices."""
    filled = [prompt.format(word=r["word"]) for r in rows]
    return [(ids, labels.index(r["label"])) for ids, r in zip(tokenizer(filled)["input_ids"], rows, strict=True)]


def answer_logits(model: Any, batch: Sequence[Example], padding: int) -> torch.Tensor:
    """Logits at the answer position: (batch, vocabulary)."""
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    longest = int(lengths.max())
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row, _ in batch])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    if model.config.model_type == "t5":
        start = torch.full((len(batch), 1), model.config.decoder_start_token_id)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits[:, 0]
    return model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(batch)), lengths - 1]


@torch.no_grad()
def accuracy(model: Any, data: Sequence[Example], tokens: torch.Tensor, padding: int) -> float:
    """Share of rows whose label token scores highest among the label tokens."""
    right = 0
    for start in range(0, len(data), 128):
        batch = data[start : start + 128]
        best = answer_logits(model, batch, padding)[:, tokens].argmax(-1)
        right += int((best == torch.tensor([label for _, label in batch])).sum())
    return right / len(data)


def tune(
    folder: Path, data: Sequence[Example], tokens: torch.Tensor, padding: int, rate: float, epochs: int, seed: int
) -> Any:
    """The model with LoRA (r = 8, alpha = 16) trained on the label token's cross-entropy over the vocabulary."""
    torch.manual_seed(seed)
    model = load(folder)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[model.config.model_type],
                                             fan_in_fan_out=model.config.model_type == "gpt2"))  # fmt: skip
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    rng, size = random.Random(seed), 32
    total = epochs * math.ceil(len(data) / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1.0, (s + 1) / 20) * (1 - s / total))
    order = list(data)
    for _ in range(epochs):
        rng.shuffle(order)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            wanted = tokens[torch.tensor([label for _, label in batch])]
            loss = torch.nn.functional.cross_entropy(answer_logits(model, batch, padding), wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()


def judge(folder: Path, splits: dict[str, list[Example]], tokens: torch.Tensor, padding: int, rates: Sequence[float],
          epochs: int, seeds: Sequence[int]) -> dict[str, Any]:  # fmt: skip
    """Zero-shot and tuned accuracy of one model with one prompt."""
    zero = accuracy(load(folder), splits["test"], tokens, padding)

    def tuned(rate: float, seed: int) -> Any:
        return tune(folder, splits["train"], tokens, padding, rate, epochs, seed)

    first = {rate: tuned(rate, seeds[0]) for rate in rates}
    seen = {rate: accuracy(model, splits["validation"], tokens, padding) for rate, model in first.items()}
    best = max(seen, key=lambda rate: seen[rate])
    chosen = itertools.chain([first[best]], (tuned(best, seed) for seed in seeds[1:]))
    tests = [accuracy(model, splits["test"], tokens, padding) for model in chosen]
    return {"zero_shot": zero, "validation": seen, "rate": best, "tests": tests, "tuned": statistics.mean(tests)}


def main() -> None:
    """Read the command line, judge, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description="Tune small and large with LoRA and print the room between them.",
        epilog="example: python pairs/judge.py pairs/gpt2 --task src/plugbridge/tasks/data/wordnet-kind --seeds 0 1 2",
    )
    parser.add_argument("pair", type=Path, help="directory with small/ and large/")
    parser.add_argument("--task", type=Path, required=True, help="directory with train, validation and test .jsonl")
    parser.add_argument("--prompts", nargs="+", choices=sorted(PROMPTS), default=sorted(PROMPTS))
    parser.add_argument("--sizes", nargs="+", choices=["small", "large"], default=["small", "large"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="learning rates to try")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {name: read_rows(args.task / f"{name}.jsonl") for name in ("train", "validation", "test")}
    labels = sorted({row["label"] for row in rows["train"]})
    results: dict[str, Any] = {"n_test": len(rows["test"]), "seeds": args.seeds, "epochs": args.epochs}
    for prompt in args.prompts:
        for size in args.sizes:
            folder = args.pair / size
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokens = torch.tensor([tokenizer.encode(" " + w, add_special_tokens=False)[0] for w in labels])
            splits = {name: examples(r, PROMPTS[prompt], tokenizer, labels) for name, r in rows.items()}
            begun = time.monotonic()
            found = judge(folder, splits, tokens, tokenizer.pad_token_id, args.rates, args.epochs, args.seeds)
            results.setdefault(prompt, {})[size] = found
            tests = " ".join(f"{x:.3f}" for x in found["tests"])
            print(f"{args.pair.name} {prompt:9s} {size:6s} zero-shot {found['zero_shot']:.3f} "
                  f"tuned {found['tuned']:.3f} ({tests}) rate {found['rate']:g} {found['validation']} "
                  f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
        if len(args.sizes) == 2:
            results[prompt]["room"] = results[prompt]["large"]["tuned"] - results[prompt]["small"]["tuned"]
            print(f"{args.pair.name} {prompt:9s} room {results[prompt]['room']:+.3f}", flush=True)
    print(json.dumps(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
