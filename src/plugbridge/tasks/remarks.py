"""What the rows of a run tell once they are tokens: what was cut, and what a reader of the results should know."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from plugbridge.errors import DataError
from plugbridge.parsing import shown
from plugbridge.tasks.encode import Encoded, Encoder
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.spec import Split, Task


class Cut(TypedDict):
    """How many rows a split has, how many of them lost a part of their passage, and how many all of it."""

    rows: int
    cut: int
    emptied: int


def cut_of(rows: Sequence[Encoded]) -> Cut:
    """What was cut of a split's rows."""
    cut = [row for row in rows if row.kept < 1]
    return {"rows": len(rows), "cut": len(cut), "emptied": sum(row.kept == 0 for row in cut)}


def remarks(task: Task, encoder: Encoder, rows: Mapping[Split, Sequence[Encoded]]) -> list[str]:
    """What is to be said of a run's rows, a line each. Raises DataError for splits of which nothing is left to read."""
    form = task.form(encoder.kind)
    said = [_cut_line(task, encoder, split, found) for split, found in rows.items()]
    for split, found in rows.items():
        if len(found) > 1 and len({row.prompt for row in found}) == 1 and split == "train":
            raise DataError(
                f"task '{task.name}': all {len(found):,} {split} prompts are the same {len(found[0].prompt)} tokens, "
                f"the first at {_where(found[0])}; does the tokenizer know the language of the rows?"
            )
        said.append(_long_targets(form, encoder, split, found))
    said += [unequal_words(form, rows["train"]), _fused(rows), _tied(form, rows)]
    return [line for line in said if line is not None]


def _where(row: Encoded) -> str:
    return row.row.where if row.row is not None else "?"


def _cut_line(task: Task, encoder: Encoder, split: Split, rows: Sequence[Encoded]) -> str | None:
    found = cut_of(rows)
    if not found["cut"]:
        return None
    if found["emptied"] == len(rows):
        raise DataError(
            f"task '{task.name}': nothing of {shown(task.passage)} fits in any of the {len(rows):,} {split} rows "
            f"({encoder.positions} tokens); raise max_length, or take models with more positions"
        )
    line = (
        f"{found['cut']:,} of {len(rows):,} {split} rows lose the end of {shown(task.passage)} to fit "
        f"{encoder.positions} tokens"
    )
    return line if not found["emptied"] else f"{line}, {found['emptied']:,} of them all of it"


def _long_targets(form: PromptForm, encoder: Encoder, split: Split, rows: Sequence[Encoded]) -> str | None:
    """Texts that are longer than what may be written, and so can be learnt but not given."""
    if form.generate is None:
        return None
    end = 0 if encoder.tokenizer.eos_token_id is None else 1
    counts = [len(row.options[0]) - end for row in rows if row.options]
    long = [count for count in counts if count > form.max_new_tokens]
    if not long:
        return None
    return (
        f"{len(long):,} of {len(rows):,} {split} rows' texts take more than the {form.max_new_tokens} tokens that are "
        f"written at most, the longest {max(long)}; raise max_new_tokens"
    )


def _fused(rows: Mapping[Split, Sequence[Encoded]]) -> str | None:
    """That the tokenizer would read the prompt and an answer otherwise in one text than one after the other."""
    whole = [row for found in rows.values() for row in found]
    fused = [row.row for row in whole if row.fused and row.row is not None]
    if not fused:
        return None
    prompt, answer = fused[0].prompt[-12:], (fused[0].options or ("",))[0][:12]
    return (
        f"in {len(fused):,} of {len(whole):,} rows the tokenizer would make one token of the prompt's end and an "
        f"answer's beginning, such as {prompt!r} and {answer!r}; they are read one after the other: end the prompt "
        "without a blank, and begin answers with one"
    )


def _tied(form: PromptForm, rows: Mapping[Split, Sequence[Encoded]]) -> str | None:
    """That options of one row begin with the same token where the first one decides: the first listed wins."""
    if form.decision != "first" or form.options_from is None:
        return None
    whole = [row for found in rows.values() for row in found]
    tied = [row for row in whole if len({option[:1] for option in row.options}) < len(row.options)]
    if not tied:
        return None
    if len(tied) == len(whole):
        raise DataError(
            f"all {len(whole):,} rows have options that begin with the same token, the first at {_where(tied[0])}, and "
            "`score` is first, which cannot tell them apart; use score: mean or sum"
        )
    return (
        f"in {len(tied):,} of {len(whole):,} rows options begin with the same token, which `score: first` cannot tell "
        "apart: the one that is listed first wins"
    )


def unequal_words(form: PromptForm, rows: Sequence[Encoded]) -> str | None:
    """That the label words differ in tokens, and by what they are ranked then; None where they do not."""
    if not form.same_options or not rows:
        return None
    counts = [len(option) for option in rows[0].options]
    if len(set(counts)) == 1:
        return None
    words = ", ".join(f"{shown(word)} {count}" for word, count in zip((form.words or {}).values(), counts, strict=True))
    how = {
        "sum": "the sum of their tokens' log-probabilities",
        "mean": "the mean of their tokens' log-probabilities",
        "first": "their first token alone",
    }[form.decision]
    return f"the label words differ in tokens ({words}); they are ranked by {how} (task.score: {form.decision})"
