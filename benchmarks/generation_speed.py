"""Generation with a LoRA checkpoint merged into the large model, against the untouched large model.

Both write the same number of tokens after the same prompts, greedily, one after the other in random order, again and
again; the ratio of each pair's seconds is taken, and the median of all pairs with its 95 % interval (of order
statistics, which asks for no distribution). With random LoRA weights: their values do not matter to the time.

    python benchmarks/generation_speed.py pairs/gpt2/large --table docs/results/generation_speed.md
"""

import argparse
import copy
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from plugbridge.files import write_json, write_text
from plugbridge.models import layout_for, load_model
from plugbridge.tuners.module import attach, trainable
from plugbridge.tuners.table import METHODS, MethodSettings


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with a LoRA merged in."""
    wrapped, _ = attach(copy.deepcopy(model), METHODS["lora"], layout_for(model), MethodSettings(8, 16.0))
    with torch.no_grad():
        for tensor in trainable(wrapped).values():
            tensor.normal_(std=0.01)
    return wrapped.merge_and_unload().eval()


def seconds_of(model: PreTrainedModel, tokens: torch.Tensor, count: int) -> float:
    """Time to write so many tokens after each prompt. tokens: (prompts, length)."""
    mask = torch.ones_like(tokens)
    begun = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=tokens, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - begun


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median: the order statistics that a fair coin's tosses end between."""
    ordered, count = sorted(values), len(values)
    apart = 1.96 * math.sqrt(count) / 2
    return ordered[max(0, math.floor(count / 2 - apart))], ordered[min(count - 1, math.ceil(count / 2 + apart))]


def main() -> None:
    """Time pairs of generations and write the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of the large model")
    for name, value in (("pairs", 100), ("tokens", 32), ("prompts", 4), ("length", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    plain = load_model(args.model)
    for parameter in plain.parameters():  # in memory of their own, as the merged weights are
        parameter.data = parameter.data.clone()
    ways = {"untouched": plain, "merged": merged(plain)}
    tokens = torch.randint(5, plain.config.vocab_size, (args.prompts, args.length))
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.pairs + 2):
        for name in order.sample(sorted(ways), 2):
            taken = seconds_of(ways[name], tokens, args.tokens)
            if turn >= 2:  # the first pairs warm up
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["merged"], seconds["untouched"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    least, most = interval(ratios)
    line = f"| {middle:.4f} | {least:.4f} to {most:.4f} | {low:.3f} to {high:.3f} |"
    line += f" {statistics.median(seconds['untouched']):.3f} |"
    head = "| merged / untouched, median | its 95 % interval | quartiles | seconds, untouched |"
    lines = [head, "|---|---|---|---|", line]
    print("\n".join(lines))
    if args.table is not None:
        about = (__doc__ or "").partition("    python")[0].strip()
        size = f"{args.pairs} pairs, {args.prompts} prompts of {args.length} tokens, {args.tokens} tokens written, "
        size += f"{args.threads} thread(s), {args.model}."
        command = f"    python benchmarks/generation_speed.py {' '.join(sys.argv[1:])}"
        write_text(args.table, "\n".join(["# Generation speed", "", about, "", size, "", command, "", *lines, ""]))
        write_json(args.table.with_suffix(".json"), {"ratios": ratios, **seconds})


if __name__ == "__main__":
    main()
