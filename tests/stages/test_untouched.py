"""Whole runs in which no weight of the large model ever asks for a gradient, or has one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from plugbridge.families.spec import Layout
from plugbridge.prepare import Prepared
from test_durability import start

Raw = dict[str, Any]
TRAIN = {"steps": 2, "batch_size": 4}
Loaded = tuple[PreTrainedModel, Layout]


class Watched:
    """The large models that a run loads, their weights looked at whenever a part of them runs."""

    def __init__(self) -> None:
        self.loads = self.looks = 0
        self.faults: list[str] = []
        self._weights: list[tuple[str, torch.Tensor]] = []

    def take(self, loaded: Loaded) -> Loaded:
        model, _ = loaded
        self.loads += 1
        own = {id(weight) for weight in model.parameters()}
        self._weights.extend(model.named_parameters())

        def look(module: torch.nn.Module, *_: Any) -> None:
            self.looks += 1
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in own and (weight.requires_grad or weight.grad is not None):
                    self.faults.append(f"{name} of {type(module).__name__}")

        for module in model.modules():
            module.register_forward_pre_hook(look)
        return loaded

    def end(self) -> None:
        self.faults.extend(f"{name} at the end" for name, weight in self._weights if weight.grad is not None)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found, load, fit = Watched(), Prepared.load_large, Prepared.load_to_fit
    monkeypatch.setattr(Prepared, "load_large", lambda self: found.take(load(self)))
    monkeypatch.setattr(Prepared, "load_to_fit", lambda self: found.take(fit(self)))
    return found


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("gpt2", "standalone"),
        ("gpt2", "feedback"),
        ("t5", "feedback"),
        ("t5", "identity"),
        ("t5", "ladder"),
        ("gpt2", "ladder_delta"),
    ],
)
def test_no_weight_of_the_large_model_asks_for_a_gradient(
    run_config: Callable[..., Raw], watched: Watched, tmp_path: Path, family: str, mode: str
) -> None:
    """From scoring to evaluation, with repair and polish; importance that needs gradients is left out."""
    target = "logits" if mode == "standalone" else "response"
    channels = "select" if mode == "standalone" else "pca"
    raw = run_config(
        family,
        score={"importance": "activation", "samples": 4},
        prune={"reduction": 2, "channels": channels},
        repair=None if mode in ("ladder", "identity") else {**TRAIN, "target": target},
        couple={**TRAIN, "mode": mode},
        polish={"evaluations": 2, "rows": 4, "batch_size": 4},
        tune=TRAIN, ceiling=None, evaluate={"limit": 4, "probe": True},
    )  # fmt: skip
    assert set(start(raw, tmp_path / "run").values()) == {"running"}
    watched.end()
    assert watched.faults == []
    assert watched.loads >= 4  # score, prune, polish, evaluate
    assert watched.looks > 100


def test_the_papers_importance_takes_gradients_once(
    run_config: Callable[..., Raw], watched: Watched, tmp_path: Path
) -> None:
    """Fisher information is the one exception; after scoring there is none."""
    raw = run_config("t5", score={"importance": "fisher", "samples": 4}, couple={**TRAIN, "mode": "feedback"},
                     prune={"reduction": 2}, tune=TRAIN, ceiling=None, evaluate={"limit": 4})  # fmt: skip
    for stage in ("tune", "score"):
        start(raw, tmp_path / "run", only=stage)
    assert watched.faults  # so the other tests would see it
    watched.faults.clear()
    start(raw, tmp_path / "run")
    watched.end()
    assert watched.faults == []
