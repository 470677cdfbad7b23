"""Metrics over answers, by name. What a model chose or wrote meets the row's accepted texts."""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from plugbridge.errors import ConfigError
from plugbridge.parsing import shown
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.rows import Row

NONE = -1  # the choice of a model whose text is none of the options


@dataclass(frozen=True)
class Answer:
    """A model's answer to a row: the position of the option it chose, that option's text or the text it wrote.

    `scores` has what the choice was made on, of every option, and is empty for a text that was written.
    """

    row: Row
    choice: int
    text: str
    scores: tuple[float, ...] = ()


def chosen(row: Row, choice: int, scores: Sequence[float] = ()) -> Answer:
    """The answer of a model that chose an option."""
    return Answer(row, choice, row.options[choice], tuple(scores))


def written(form: PromptForm, row: Row, text: str) -> Answer:
    """The answer of a model that wrote a text: as the form's judge reads it, else the first option that it equals."""
    if form.judge is not None:
        verdict = "true" if JUDGES[form.judge](text, row) else "false"
        return Answer(row, list(form.words or ()).index(verdict), text)
    same = [i for i, option in enumerate(row.options) if option.strip() == text.strip()]
    return Answer(row, same[0] if same else NONE, text)


def same_referent(text: str, phrase: str) -> bool:
    """Whether two noun phrases name the same thing: the words of one are among those of the other.

    Raffel et al. 2020, section 2.4, for WSC. Case, determiners and possessives, and punctuation at a word's ends do
    not count. An empty text names nothing, and a possessive ("Bob's hat") is not its owner ("Bob").
    """
    if ("'" in text) != ("'" in phrase):
        return False
    left, right = _words(text), _words(phrase)
    return bool(left) and bool(right) and (left <= right or right <= left)


_DETERMINERS = frozenset(
    [
        "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their", "whose",
        "which", "some", "every", "each", "many", "much", "few",
    ]
)  # fmt: skip


def _words(text: str) -> set[str]:
    return {word.strip(string.punctuation) for word in text.lower().split()} - _DETERMINERS - {""}


def _names_the_target(text: str, row: Row) -> bool:
    phrase = str(row.fields["span1_text"]) if row.target is None else row.target
    return same_referent(text, phrase)


JUDGES: dict[str, Callable[[str, Row], bool]] = {"referent": _names_the_target}


def is_right(answer: Answer) -> bool:
    """Whether a model's choice is a right one: there may be several."""
    return answer.choice in (answer.row.answer, *answer.row.also)


def _right(answers: Sequence[Answer]) -> list[int]:
    return [answer.row.answer for answer in answers]


def _choices(answers: Sequence[Answer]) -> list[int]:
    return [answer.choice for answer in answers]


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of rows answered right, with any of the right options where there are several."""
    return sum(map(is_right, answers)) / len(answers)


def macro_f1(answers: Sequence[Answer]) -> float:
    """F1 per class, unweighted mean over the classes that occur (SuperGLUE's CB)."""
    from sklearn.metrics import f1_score

    right, found = _right(answers), _choices(answers)
    return float(f1_score(right, found, average="macro", zero_division=0.0))  # pyright: ignore[reportArgumentType]


def f1(answers: Sequence[Answer]) -> float:
    """F1 of the second of two options, over all rows: GLUE's MRPC, and MultiRC's F1a over all answer options."""
    from sklearn.metrics import f1_score

    right, found = _right(answers), _choices(answers)
    return float(f1_score(right, found, pos_label=1, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def matthews(answers: Sequence[Answer]) -> float:
    """Matthews correlation, -1 to 1, 0 where one side is constant (GLUE's CoLA, SuperGLUE's AX-b)."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(_right(answers), _choices(answers)))


def _question(row: Row) -> Hashable:
    return row.fields["paragraph_idx"], row.fields["question_idx"]


def _pair(row: Row) -> Hashable:
    return int(row.fields["idx"]) // 2


def question_match(answers: Sequence[Answer]) -> float:
    """Share of questions with every answer option judged right, wherever its rows stand (MultiRC's exact match)."""
    verdicts: defaultdict[Hashable, list[bool]] = defaultdict(list)
    for answer in answers:
        verdicts[_question(answer.row)].append(answer.choice == answer.row.answer)
    return sum(map(all, verdicts.values())) / len(verdicts)


def gender_parity(answers: Sequence[Answer]) -> float:
    """Share of AX-g's pairs, rows 2k and 2k + 1 that differ in a pronoun's gender, with the same answer to both."""
    pairs: defaultdict[Hashable, list[int]] = defaultdict(list)
    for answer in answers:
        pairs[_pair(answer.row)].append(answer.choice)
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    return sum(first == second for first, second in whole) / max(1, len(whole))


def normalised(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of texts that are an accepted one as it is written, blanks at the ends aside."""
    return _share_of(str.strip, answers)


def squad_match(answers: Sequence[Answer]) -> float:
    """Share of texts that equal an accepted one after SQuAD's normalisation (ReCoRD's EM)."""
    return _share_of(normalised, answers)


def _share_of(form: Callable[[str], str], answers: Sequence[Answer]) -> float:
    hits = [form(answer.text) in {form(text) for text in answer.row.accepted} for answer in answers]
    return sum(hits) / len(hits)


def token_f1(answers: Sequence[Answer]) -> float:
    """F1 of the words as they are written against the accepted text that fits best, mean over rows."""
    return sum(_best(words_in_common, answer) for answer in answers) / len(answers)


def squad_f1(answers: Sequence[Answer]) -> float:
    """F1 of the words after SQuAD's normalisation against the accepted text that fits best, mean (ReCoRD's F1)."""
    return sum(_best(_normalised_in_common, answer) for answer in answers) / len(answers)


def _normalised_in_common(text: str, accepted: str) -> float:
    return words_in_common(normalised(text), normalised(accepted))


def words_in_common(text: str, accepted: str) -> float:
    """F1 of two texts' words, each as often as it occurs (Rajpurkar et al. 2016); 0 if they share none."""
    found, wanted = text.split(), accepted.split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def rouge_l(answers: Sequence[Answer]) -> float:
    """ROUGE-L's F (Lin 2004), without stemming, against the best accepted text, mean over rows. Raises ConfigError."""
    scorer = _rouge()
    values = [_best(lambda text, target: scorer.score(target, text)["rougeL"].fmeasure, a) for a in answers]
    return sum(values) / len(values)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "metric rouge_l needs the package rouge-score, which is not installed; pip install 'plugbridge[rouge]'"
        ) from error
    return RougeScorer(["rougeL"])


def _best(score: Callable[[str, str], float], answer: Answer) -> float:
    return max((score(answer.text, text) for text in answer.row.accepted), default=0.0)


Metric = Callable[[Sequence[Answer]], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1": f1,
    "f1a": f1,
    "question_match": question_match,
    "matthews": matthews,
    "gender_parity": gender_parity,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "squad_match": squad_match,
    "squad_f1": squad_f1,
    "rouge_l": rouge_l,
}
UNITS: dict[str, Callable[[Row], Hashable]] = {"question_match": _question, "gender_parity": _pair}
"""What rows a metric judges together: scored in part, such rows would say something else."""
LABEL_METRICS = frozenset({"accuracy", "macro_f1", "f1", "matthews"})
TEXT_METRICS = frozenset({"exact_match", "token_f1", "squad_match", "squad_f1", "rouge_l"})
OPTION_METRICS = frozenset({"accuracy"})
"""Of options that rows list: the first of one row is no class with the first of another."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuse metrics that cannot be computed, before any work. Raises ConfigError."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"no metric {shown(name)}; known: {', '.join(METRICS)}")
    if "rouge_l" in names:
        _rouge()


def metrics_of(names: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Metrics by name, in the names' order; a judge's or a group's rows may stand anywhere."""
    return {name: METRICS[name](answers) for name in names}


def majority(form: PromptForm, rows: Sequence[Row]) -> list[Answer]:
    """The commonest right answer given to every row: its position, or, of texts to write, its text."""
    if form.generate is not None and form.judge is None:
        [(text, _)] = Counter(row.accepted[0] for row in rows).most_common(1)
        return [written(form, row, text) for row in rows]
    counts = Counter(row.answer for row in rows)
    common = max(sorted(counts), key=counts.__getitem__)
    return [chosen(row, min(common, len(row.options) - 1)) for row in rows]
