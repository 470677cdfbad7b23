"""Metrics over predicted and right options, by name."""

from collections.abc import Callable, Sequence

from sklearn.metrics import accuracy_score, f1_score

Metric = Callable[[Sequence[int], Sequence[int]], float]


def accuracy(predicted: Sequence[int], right: Sequence[int]) -> float:
    """Share of rows answered right."""
    return float(accuracy_score(right, predicted))


def macro_f1(predicted: Sequence[int], right: Sequence[int]) -> float:
    """F1 per class, unweighted mean over the classes that occur (SuperGLUE's CB)."""
    return float(f1_score(right, predicted, average="macro", zero_division=0.0))  # pyright: ignore[reportArgumentType]


METRICS: dict[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
