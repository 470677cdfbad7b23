"""Steps on a card that is not there: fake tensors on a second device show every tensor left on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.modeling_utils as modelling
from torch.utils import backend_registration

from plugbridge.memory.case import Case
from plugbridge.memory.predict import trace
from plugbridge.memory.shapes import gpt2, t5
from plugbridge.memory.steps import STEPS

GPT2, T5 = gpt2(16, 1, 2, 64, 32), t5(16, 1, 2, 8, 32, 64)
CASES = (
    ("score", GPT2, "select", "fisher"),
    ("score", GPT2, "select", "activation"),
    ("repair", GPT2, "gradient_pca", "fisher"),
    ("couple, feedback", GPT2, "gradient_pca", "fisher"),
    ("couple, feedback", T5, "gradient_pca", "fisher"),
    ("couple, ladder", T5, "select", "fisher"),
    ("couple, ladder_delta", T5, "gradient_pca", "fisher"),
)


def _peaks_on_a_card() -> list[int]:
    real: Any = torch.tensor  # which goes past the fakes; transformers' caches begin as torch.tensor([])

    def tensor(data: Any, **given: Any) -> torch.Tensor:
        return torch.empty(0, **given) if data == [] and given.get("device") is not None else real(data, **given)

    backend_registration._setup_privateuseone_for_python_backend("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelling, "get_torch_context_manager_or_global_device", lambda: torch.device("card"))
        patch.setattr(torch, "tensor", tensor)
        return [
            trace(
                Case(config, 2, 8, reduction=2, channels=channels, importance=importance, device="card"), STEPS[name]
            ).peak
            for name, config, channels, importance in CASES
        ]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no such device"
)
def test_no_step_mixes_devices(clean: Callable[..., Any]) -> None:
    """Torch registers a device for a whole process, so the steps run in one of their own."""
    assert min(clean(_peaks_on_a_card)) > 0
