"""An operation on fake tensors that is remembered gives what doing it gives."""

from typing import Any

import pytest
import torch

from conftest import make_model
from plugbridge.memory import alive
from plugbridge.memory.alive import Alive, fake_tensors
from plugbridge.memory.case import Case
from plugbridge.memory.predict import trace
from plugbridge.memory.steps import STEPS
from plugbridge.tuners.table import MethodSettings


@pytest.mark.parametrize(
    ("family", "step", "changes"),
    [
        ("t5", "tuned", {}),
        ("gpt2", "score", {"streamed": True}),
        ("llama", "couple, feedback", {"dtype": torch.bfloat16}),
    ],
)
def test_a_trace_is_the_same_without_a_memory(
    monkeypatch: pytest.MonkeyPatch, family: str, step: str, changes: dict[str, Any]
) -> None:
    case = Case(make_model(family).config, 3, 9, settings=MethodSettings(2, 4.0), reduction=2, **changes)
    trace(case, STEPS[step])
    again = trace(case, STEPS[step])
    monkeypatch.setattr(alive, "key_of", lambda *_: None)
    assert trace(case, STEPS[step]) == again


def test_numbers_of_other_types_and_precisions_are_other_questions() -> None:
    for _ in range(2):
        with fake_tensors():
            outside = torch.ones(3)
            with Alive() as counted:
                whole = torch.zeros(2, 3, dtype=torch.long)
                assert [(whole + one).dtype for one in (1, 1.0, True)] == [torch.long, torch.float32, torch.long]
                torch.set_default_dtype(torch.bfloat16)
                try:
                    assert ((whole + 1.0).dtype, torch.zeros(2).dtype) == (torch.bfloat16, torch.bfloat16)
                finally:
                    torch.set_default_dtype(torch.float32)
                column = whole[:, 1]
                assert (column.untyped_storage()._cdata, column.storage_offset()) == (whole.untyped_storage()._cdata, 1)
                assert whole.add_(1) is whole
                now = counted.now
                outside.set_(torch.zeros(5).untyped_storage(), 0, (5,), (1,))
                assert outside.shape == (5,)
                assert counted.now == now + 20
