"""Metrics against values counted by hand."""

import pytest

from plugbridge.tasks.metrics import METRICS


@pytest.mark.parametrize(
    ("metric", "predicted", "right", "value"),
    [
        ("accuracy", [1, 0, 1], [1, 1, 1], 2 / 3),
        ("accuracy", [0], [0], 1.0),
        # class 0: precision 1, recall 1/2; class 1: precision 1/3, recall 1; class 2: never found
        ("macro_f1", [0, 1, 1, 1], [0, 0, 1, 2], (2 / 3 + 1 / 2 + 0) / 3),
        # a class that is only predicted counts too, with 0
        ("macro_f1", [0, 2], [0, 0], (2 / 3 + 0) / 2),
        ("macro_f1", [1, 1], [1, 1], 1.0),
        ("macro_f1", [1, 1, 1], [0, 0, 0], 0.0),
    ],
)
def test_by_hand(metric: str, predicted: list[int], right: list[int], value: float) -> None:
    assert METRICS[metric](predicted, right) == pytest.approx(value)
