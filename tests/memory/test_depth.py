"""Scoring and pruning a model on disk take no more memory for twice the layers, counted byte by byte."""

from typing import Any

import pytest

from plugbridge.memory.case import Case
from plugbridge.memory.predict import predict
from plugbridge.memory.shapes import gpt2
from plugbridge.memory.steps import STEPS


@pytest.mark.parametrize(
    ("step", "changes"),
    [("score", {}), ("score", {"importance": "activation"}), ("prune", {"channels": "gradient_pca"})],
)
def test_the_peak_is_flat_in_depth(step: str, changes: dict[str, Any]) -> None:
    shallow, deep = (
        Case(gpt2(1024, layers, 16, 8192, 512), 1, 256, streamed=True, at_once=0, **changes) for layers in (24, 48)
    )
    assert predict(deep, STEPS[step]).peak <= 1.05 * predict(shallow, STEPS[step]).peak
