"""A linear probe: what can be read from hidden states without changing the model. A reference, not a method."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the squared penalty to choose from."""


def fit_probe(states: Mapping[str, Tensor], right: Mapping[str, Sequence[int]]) -> list[int]:
    """Logistic regression on standardised states; returns the answers for the rows ``chosen``.

    `states` are (rows, width) for ``train``, ``validation`` and ``chosen``, `right` the answers of the
    first two. The penalty with the best validation accuracy is taken, the strongest of equals; with one
    answer in all training rows there is nothing to fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(right["train"])) == 1:
        return [right["train"][0]] * len(states["chosen"])
    arrays = {name: np.asarray(tensor.double().cpu()) for name, tensor in states.items()}
    best, answers = -1.0, [0] * len(arrays["chosen"])
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
        model.fit(arrays["train"], list(right["train"]))
        score = float(model.score(arrays["validation"], list(right["validation"])))
        if score > best:
            best, answers = score, [int(answer) for answer in model.predict(arrays["chosen"])]
    return answers
