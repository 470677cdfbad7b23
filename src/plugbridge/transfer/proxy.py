"""Proxy-tuning: what tuning changed in the small model's logits is added to the large model's as it decodes.

Liu et al. 2024, "Tuning Language Models by Proxy", section 3: at every token the distribution is

    softmax(large + (small, tuned - small, untuned))

No weight of the large model changes; both small models have to be kept beside it.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from plugbridge.evaluate import at_least_float32


class ProxyTuned(nn.Module):
    """The large model beside the small one, whose module is switched off for what it says untuned."""

    def __init__(self, large: PreTrainedModel, small: PeftModel) -> None:
        super().__init__()
        self.large, self.small = large, small

    @property
    def config(self) -> PretrainedConfig:
        """The large model's."""
        return self.large.config

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """As the large model's own forward pass; `logits` are of the tokens for which both models have some."""
        tuned = at_least_float32(self.small(**inputs).logits)
        with self.small.disable_adapter():
            untuned = at_least_float32(self.small(**inputs).logits)
        logits = at_least_float32(self.large(**inputs, use_cache=False).logits)
        both = min(logits.shape[-1], tuned.shape[-1])  # embeddings may be padded beyond the tokenizer's tokens
        return ModelOutput(logits=logits[..., :both] + (tuned - untuned)[..., :both])
