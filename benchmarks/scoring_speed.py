"""How fast options are scored: ours, one full pass per option, and lm-eval, on the same model and rows in one run.

The rows are wordnet-kind's test rows, eight options each: the words as they are (one token), the words behind a phrase
that all of them share (one opening), and in front of it (own tokens). All start from the same tokens, get the same
batch size, and take turns; loading is not counted, and the best of the rounds is. lm-eval's HFLM runs where it is
installed (`pip install plugbridge[crosscheck]`), with its logits cache on: for causal models it too makes one pass
where options differ in the last token only. Every scorer must give the same log-probabilities.

    python benchmarks/scoring_speed.py --threads 1 2 --table docs/results/scoring_speed.md
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plugbridge.evaluate import log_likelihood, option_scores
from plugbridge.files import write_json, write_text
from plugbridge.models import load_model, load_tokenizer, positions_of, quiet_transformers
from plugbridge.progress import Silent
from plugbridge.tasks.encode import Encoded, Encoder, collate
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import load_rows
from plugbridge.tasks.spec import Task, load_task

ROOT = Path(__file__).resolve().parent.parent
KIND = {"gpt2": "causal", "t5": "seq2seq"}
OPTIONS = {"one token": "{}", "one opening": " some kind of{}", "own tokens": "{} of some kind"}
"""What becomes of a label word: itself, a phrase that ends with it, a phrase that begins with it."""
TOLERANCE = 1e-4  # log-probability per token
Scorer = Callable[[], list[list[float]]]
"""Scores all rows: the mean log-probability per token of every option."""


def with_phrases(task: Task, kind: str, phrase: str) -> Task:
    """The task with every label word in a phrase; only causal models' options begin with a space."""
    form, space = task.form(kind), " " if kind == "causal" else ""
    words = {label: phrase.format(f" {word.strip()}").strip() for label, word in (form.words or {}).items()}
    phrases = {label: space + word for label, word in words.items()}
    return task.model_copy(update={kind: PromptForm(prompt=form.prompt, words=phrases)})


def rows_of(task: Task, encoder: Encoder, limit: int | None) -> list[Encoded]:
    """The task's test rows in tokens."""
    form = task.form(encoder.kind)
    return [encoder.encode(task, form, row) for row in load_rows(task, encoder.kind, None, 0)["test"][:limit]]


def counted(encoder: Encoder, rows: Sequence[Encoded]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, option) of every option, without a seq2seq end mark where all options are single tokens."""
    end = 1 if encoder.kind == "seq2seq" else 0
    single = all(len(option) == 1 + end for row in rows for option in row.options)
    return [(row.prompt, option[:1] if single else option) for row in rows for option in row.options]


def by_row(values: Sequence[float], rows: Sequence[Encoded]) -> list[list[float]]:
    """The flat values of all options, row by row."""
    rest = iter(values)
    return [[next(rest) for _ in row.options] for row in rows]


def ours(model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], batch_size: int) -> Scorer:
    """What `plugbridge` does."""
    means = [replace(row, score="mean") for row in rows]
    return lambda: option_scores(model, encoder, means, batch_size, Silent(), "")


def naive(model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], batch_size: int) -> Scorer:
    """Prompt and option in full for every option, in batches."""
    pairs = counted(encoder, rows)

    @torch.no_grad()
    def score() -> list[list[float]]:
        values: list[float] = []
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            total = log_likelihood(model, collate(encoder, part), encoder.kind)
            values += (total / torch.tensor([len(option) for _, option in part])).tolist()
        return by_row(values, rows)

    return score


def lm_eval(model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded], batch_size: int) -> Scorer:
    """lm-eval's HFLM on the same tokens; its sums are divided by the number of tokens."""
    from lm_eval.models.huggingface import HFLM

    scorer: Any = HFLM(
        pretrained=model, tokenizer=encoder.tokenizer, backend=encoder.kind, batch_size=batch_size, device="cpu"
    )
    pairs = counted(encoder, rows)
    requests = [(("", ""), list(prompt), list(option)) for prompt, option in pairs]

    def score() -> list[list[float]]:
        found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
        return by_row([total / len(option) for (total, _), (_, option) in zip(found, pairs, strict=True)], rows)

    return score


SCORERS = {"plugbridge": ours, "one pass per option": naive, "lm-eval": lm_eval}


def best_seconds(scorers: dict[str, Scorer], rounds: int) -> dict[str, float]:
    """Seconds of each scorer's best round; they take turns. Raises ValueError where scores differ."""
    wanted = torch.tensor(next(iter(scorers.values()))())
    best = dict.fromkeys(scorers, float("inf"))
    for _ in range(rounds):
        for name, score in scorers.items():
            begun = time.perf_counter()
            found = score()
            best[name] = min(best[name], time.perf_counter() - begun)
            if (off := float((torch.tensor(found) - wanted).abs().max())) > TOLERANCE:
                raise ValueError(f"{name} scores differ by {off:.1e} from those of {next(iter(scorers))}")
    return best


def measured(family: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of all scorers on one family's large model, by number of threads and kind of options."""
    source = str(ROOT / "pairs" / family / "large")
    model = load_model(source)
    encoder = Encoder(load_tokenizer(source), KIND[family], positions_of(model.config))
    words = load_task("wordnet-kind")
    found: list[dict[str, Any]] = []
    for threads, (options, phrase) in product(args.threads, OPTIONS.items()):
        torch.set_num_threads(threads)
        rows = rows_of(with_phrases(words, encoder.kind, phrase), encoder, args.limit)
        names = [name for name in SCORERS if name != "lm-eval" or find_spec("lm_eval")]
        seconds = best_seconds({name: SCORERS[name](model, encoder, rows, args.batch) for name in names}, args.rounds)
        tokens = sum(len(option) for _, option in counted(encoder, rows)) / sum(len(row.options) for row in rows)
        found.append(
            {
                "model": f"pairs/{family}/large", "threads": threads, "options": options, "tokens": round(tokens, 2),
                "rows": len(rows), "rows_per_second": {name: round(len(rows) / seconds[name], 1) for name in names},
            }
        )  # fmt: skip
        print(line(found[-1]), flush=True)
    return found


def line(entry: dict[str, Any]) -> str:
    """One row of the table: rates, and how many times the others' ours is."""
    rates: dict[str, float] = entry["rows_per_second"]
    cells = [f"{rates[name]:.0f}" if name in rates else "" for name in SCORERS]
    cells += [f"{rates['plugbridge'] / rates[name]:.1f}" if name in rates else "" for name in list(SCORERS)[1:]]
    first = [entry["model"], entry["threads"], entry["options"], entry["tokens"], entry["rows"]]
    return f"| {' | '.join(map(str, first))} | {' | '.join(cells)} |"


def page(found: Sequence[dict[str, Any]], args: argparse.Namespace, load: float) -> str:
    """The Markdown page."""
    others = [f"times {name}" for name in list(SCORERS)[1:]]
    columns = [
        "model",
        "threads",
        "options",
        "tokens an option",
        "rows",
        *(f"{name}, rows/s" for name in SCORERS),
        *others,
    ]
    about = (__doc__ or "").partition("    python")[0].strip()
    return "\n".join(
        [
            f"# Speed of scoring\n\n{about}\n",
            f"fp32, batch size {args.batch}, {args.rounds} round(s), {os.cpu_count()} cores. The machine's load was "
            f"{load:.1f} before: what else it does lowers the rates, the ratios much less.\n",
            f"Made by\n\n    python benchmarks/scoring_speed.py {' '.join(sys.argv[1:])}\n",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(line(entry) for entry in found),
            "",
        ]
    )


def main() -> None:
    """Measure both families and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(KIND), default=list(KIND))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="only so many rows")
    parser.add_argument("--table", type=Path, help="Markdown file to write, its JSON beside it")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    quiet_transformers()
    found = [entry for family in args.families for entry in measured(family, args)]
    if args.table:
        write_text(args.table, page(found, args, load))
        write_json(args.table.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
