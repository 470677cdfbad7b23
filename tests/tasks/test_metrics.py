"""Metrics against values counted by hand, against scikit-learn, and in any order of the rows."""

import random
import sys
from typing import Any

import pytest
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support

from plugbridge.errors import ConfigError
from plugbridge.tasks import metrics
from plugbridge.tasks.form import PromptForm
from plugbridge.tasks.metrics import (
    METRICS,
    NONE,
    Answer,
    chosen,
    majority,
    metrics_of,
    normalised,
    same_referent,
    words_in_common,
    written,
)
from plugbridge.tasks.rows import UNLABELLED, Row

OPTIONS = ("zero", "one", "two", "three")


def answers_of(predicted: list[int], right: list[int]) -> list[Answer]:
    return [chosen(Row("", OPTIONS, r, {}, ""), p) for p, r in zip(predicted, right, strict=True)]


def wrote(text: str, *accepted: str) -> Answer:
    return Answer(Row("", accepted, 0, {}, "", tuple(range(1, len(accepted)))), NONE, text)


@pytest.mark.parametrize(
    ("metric", "predicted", "right", "value"),
    [
        ("accuracy", [1, 0, 1], [1, 1, 1], 2 / 3),
        ("accuracy", [0], [0], 1.0),
        ("accuracy", [NONE, 0], [0, 0], 0.5),  # a text that is no option is wrong
        # class 0: precision 1, recall 1/2; class 1: precision 1/3, recall 1; class 2: never found
        ("macro_f1", [0, 1, 1, 1], [0, 0, 1, 2], (2 / 3 + 1 / 2 + 0) / 3),
        # a class that is only predicted counts too, with 0
        ("macro_f1", [0, 2], [0, 0], (2 / 3 + 0) / 2),
        ("macro_f1", [1, 1], [1, 1], 1.0),
        ("macro_f1", [1, 1, 1], [0, 0, 0], 0.0),
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 / 3),  # precision 2/3, recall 2/3
        ("f1", [0, 0], [1, 0], 0.0),
        ("f1a", [1, 1, 0], [1, 0, 0], 2 / 3),  # precision 1/2, recall 1
        # true positives 2, true negatives 1, false positives 1, false negatives 1: (2 - 1) / sqrt(3 * 3 * 2 * 2)
        ("matthews", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("matthews", [0, 1], [1, 0], -1.0),
        ("matthews", [1, 1, 1], [1, 0, 1], 0.0),
    ],
)
def test_by_hand(metric: str, predicted: list[int], right: list[int], value: float) -> None:
    assert METRICS[metric](answers_of(predicted, right)) == pytest.approx(value)


def test_against_scikit_learn() -> None:
    generator = random.Random(3)
    right = [generator.randrange(2) for _ in range(200)]
    predicted = [r if generator.random() < 0.7 else 1 - r for r in right]
    answers = answers_of(predicted, right)
    precision, recall, score, _ = precision_recall_fscore_support(right, predicted, average="binary")
    assert (
        METRICS["f1a"](answers) == pytest.approx(score) == pytest.approx(2 * precision * recall / (precision + recall))
    )
    assert METRICS["matthews"](answers) == pytest.approx(matthews_corrcoef(right, predicted))
    assert METRICS["macro_f1"](answers) == pytest.approx(f1_score(right, predicted, average="macro"))
    assert METRICS["accuracy"](answers) == pytest.approx(
        sum(p == r for p, r in zip(predicted, right, strict=True)) / 200
    )


def multirc(paragraph: int, question: int, predicted: int, right: int) -> Answer:
    return chosen(Row("", ("no", "yes"), right, {"paragraph_idx": paragraph, "question_idx": question}, ""), predicted)


MULTIRC = [
    multirc(0, 0, 1, 1), multirc(0, 0, 0, 0), multirc(0, 0, 0, 0),  # all right
    multirc(0, 1, 1, 1), multirc(0, 1, 1, 0),  # one wrong
    multirc(1, 0, 0, 0),  # the same question number of another paragraph
    multirc(1, 1, 0, 1), multirc(1, 1, 0, 0),  # one wrong
]  # fmt: skip


def test_multirc_counts_whole_questions_whatever_their_rows_order() -> None:
    for seed in range(5):
        rows = random.Random(seed).sample(MULTIRC, len(MULTIRC))
        assert METRICS["question_match"](rows) == pytest.approx(2 / 4)
        assert METRICS["f1a"](rows) == pytest.approx(2 / 3)  # 2 found right, 1 wrongly, 1 missed


def test_gender_parity_compares_pairs() -> None:
    right, predicted = [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]
    pairs = enumerate(zip(right, predicted, strict=True))
    rows = [chosen(Row("", ("a", "b"), r, {"idx": i}, ""), p) for i, (r, p) in pairs]
    random.Random(0).shuffle(rows)
    assert METRICS["gender_parity"](rows) == pytest.approx(2 / 3)  # both wrong is parity too
    assert METRICS["gender_parity"]([row for row in rows if row.row.fields["idx"] != 1]) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Beatles!", "beatles"), ("an apple, a day", "apple day"), ("U.S.", "us"), ("theatre", "theatre"),
        ("Jack's car", "jacks car"), ("the-end", "theend"), ("", ""), ("A", ""),
        ("caf\u00e9 \u2013", "caf\u00e9 \u2013"),
    ],
)  # fmt: skip
def test_squad_normalisation(text: str, plain: str) -> None:
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("text", "accepted", "f1", "exact"),
    [
        (" the Chelsea", ["Chelsea"], 1.0, 1.0),
        ("Olimpija", ["Chelsea", "Olimpija Ljubljana"], 2 / 3, 0.0),  # precision 1, recall 1/2, the best of both
        ("a b b", ["b b c"], 0.8, 0.0),  # "a" is an article: found b b, wanted b b c
        ("b", ["b b"], 2 / 3, 0.0),  # a word counts as often as it occurs
        ("Chelsea", ["Zouma"], 0.0, 0.0),
        ("", ["Zouma"], 0.0, 0.0),
    ],
)
def test_record_by_hand(text: str, accepted: list[str], f1: float, exact: float) -> None:
    found = metrics_of(("squad_f1", "squad_match"), [wrote(text, *accepted)])
    assert found == pytest.approx({"squad_f1": f1, "squad_match": exact})


@pytest.mark.parametrize(
    ("text", "accepted", "exact", "f1"),
    [
        ("", ["A"], 0, 0), ("3", ["-3"], 0, 0), ("15", ["1.5"], 0, 0), ("C", ["C++"], 0, 0), ("a", ["A"], 0, 0),
        ("New  York", ["New York"], 0, 1), (" A\n", ["B", " A"], 1, 1), ("the fox", ["The fox"], 0, 1 / 2),
    ],
)  # fmt: skip
def test_texts_are_matched_as_they_are_written(text: str, accepted: list[str], exact: float, f1: float) -> None:
    """SQuAD's rule, which ReCoRD has by name, takes all of the first four for right, or for half right."""
    assert metrics_of(("exact_match", "token_f1"), [wrote(text, *accepted)]) == {
        "exact_match": exact, "token_f1": f1,
    }  # fmt: skip


def test_squads_rule_is_a_choice_by_name() -> None:
    pairs = [("", "A"), ("3", "-3"), ("15", "1.5"), ("C", "C++")]
    assert METRICS["squad_match"]([wrote(text, gold) for text, gold in pairs]) == 1.0
    assert METRICS["squad_f1"]([wrote(text, gold) for text, gold in pairs]) == 3 / 4  # nothing has no words


def test_any_right_option_is_right() -> None:
    row = Row("", (" Bhutto", " Zardari", " Benazir Bhutto"), 2, {}, "", (0,))
    assert METRICS["accuracy"]([chosen(row, i) for i in range(3)]) == pytest.approx(2 / 3)


def test_texts_are_averaged_over_rows() -> None:
    rows = [wrote("Chelsea", "Chelsea"), wrote("x", "y"), wrote("Olimpija", "Olimpija Ljubljana"), wrote("z", "z")]
    assert METRICS["token_f1"](rows) == METRICS["squad_f1"](rows) == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    assert METRICS["exact_match"](rows) == pytest.approx(2 / 4)


def test_an_option_of_several_right_ones() -> None:
    row = Row("", (" Bhutto", " Zardari", " Benazir Bhutto"), 2, {}, "", (0,))
    assert row.accepted == (" Benazir Bhutto", " Bhutto")
    assert [METRICS["exact_match"]([chosen(row, i)]) for i in range(3)] == [1.0, 0.0, 1.0]
    assert Row("", ("a",), UNLABELLED, {}, "").accepted == ()


def test_rouge_l_by_hand() -> None:
    # the longest common subsequence of "police killed the gunman" is 3 of 4 and 3 of 4 words (Lin 2004)
    assert METRICS["rouge_l"]([wrote("police kill the gunman", "police killed the gunman")]) == pytest.approx(3 / 4)
    assert METRICS["rouge_l"]([wrote("the gunman kill police", "police killed the gunman")]) == pytest.approx(2 / 4)
    assert METRICS["rouge_l"]([wrote("a b c", "x", "c b a"), wrote("q", "r")]) == pytest.approx((1 / 3 + 0) / 2)


def test_rouge_l_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"^metric rouge_l needs the package rouge-score, .*'plugbridge\[rouge\]'$"):
        METRICS["rouge_l"]([wrote("a", "a")])
    metrics._rouge.cache_clear()


@pytest.mark.parametrize(
    ("text", "phrase", "same"),
    [
        ("stable", "the stable", True),
        ("The stable", "a stable", True),
        ("fuzzy bunny", "bunny", True),
        ("bunny", "his fuzzy bunny", True),
        ("the trees", "the tree", False),
        ("Bob", "Bob's hat", False),
        ("Bob's hat", "bob's", True),
        ("the city councilmen", "the demonstrators", False),
        ("big dog", "small dog", False),  # neither holds the other
        ("stable.", "stable", True),
        ("", "the stable", False),
        ("the", "the stable", False),  # determiners name nothing
        ("stable", "the", False),
    ],
)
def test_wsc_spans(text: str, phrase: str, same: bool) -> None:
    assert same_referent(text, phrase) is same
    assert same_referent(phrase, text) is same


WSC = PromptForm(prompt="{marked}", words={"false": "False", "true": "True"}, generate="{span1_text}", judge="referent")


def wsc(label: int, phrase: str, text: str) -> Answer:
    return written(WSC, Row("", ("False", "True"), label, {"span1_text": phrase}, "", (), phrase), text)


def test_wsc_is_judged_by_span() -> None:
    answers = [
        wsc(1, "the stable", "stable"),  # names it, and it is
        wsc(1, "the stable", "door"),  # names another, and it is
        wsc(0, "the stable", "door"),  # names another, and it is not
        wsc(0, "the stable", "the stable"),  # names it, and it is not
        wsc(0, "the stable", ""),
    ]
    assert [answer.choice for answer in answers] == [1, 0, 0, 1, 0]
    assert METRICS["accuracy"](answers) == pytest.approx(3 / 5)
    unlabelled = Row("", ("False", "True"), UNLABELLED, {"span1_text": "the stable"}, "")
    assert written(WSC, unlabelled, "stable").choice == 1


def test_what_a_model_wrote_is_an_option_or_none() -> None:
    form, row = PromptForm(prompt="{q}", generate="{a}"), Row("", (" New York", "NYC"), 0, {}, "", (1,))
    assert [written(form, row, text).choice for text in ("New York ", "NYC", "New  York")] == [0, 1, NONE]


@pytest.mark.parametrize("right", [[1, 1, 0], [0, 0, 1]])
def test_the_majority_answers_one_way(right: list[int]) -> None:
    words = PromptForm(prompt="{q}", words={"0": "a", "1": "b"})
    rows = [Row("", ("a", "b"), r, {}, "") for r in right]
    assert [answer.choice for answer in majority(words, rows)] == [right[0]] * 3
    assert METRICS["accuracy"](majority(words, rows)) == pytest.approx(2 / 3)


def test_the_majority_of_texts_and_of_options_that_differ() -> None:
    form = PromptForm(prompt="{q}", generate="{a}")
    rows = [Row("", (text,), 0, {}, "") for text in ("x", "y", "y")]
    assert [answer.text for answer in majority(form, rows)] == ["y"] * 3
    listed = PromptForm(prompt="{q}", options_from="e")
    rows = [Row("", options, answer, {}, "") for options, answer in ((("a", "b"), 1), (("c", "d"), 1), (("e",), 0))]
    assert [answer.text for answer in majority(listed, rows)] == ["b", "d", "e"]


def test_words_in_common_is_symmetric() -> None:
    texts: list[Any] = ["the red fox", "red", "fox red fox", ""]
    assert all(words_in_common(a, b) == words_in_common(b, a) for a in texts for b in texts)
