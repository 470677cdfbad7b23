"""What a stage says of numbers that are not finite."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import make_model
from plugbridge.stages.work import why_not_finite


def test_the_tensor_is_named_as_in_the_checkpoint() -> None:
    model = make_model("gpt2")
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] = torch.inf
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert why_not_finite(make_model("gpt2"), wrapped.base_model.model).startswith(
        "tensor 'transformer.h.1.attn.c_attn.weight' has entries"
    )


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        ([torch.float32], "every weight is finite, so it overflows in float32"),
        ([torch.bfloat16, torch.float32], "so it overflows in bfloat16 or float32; use dtype: float32"),
        ([torch.int8, torch.float16], "so it overflows in float16; use dtype: float32"),
    ],
)
def test_finite_weights_overflow(dtypes: list[torch.dtype], said: str) -> None:
    models = [nn.ParameterDict({"a": nn.Parameter(torch.ones(2, dtype=d), requires_grad=False)}) for d in dtypes]
    assert why_not_finite(*models).endswith(said)
