"""Shapes of model pairs to measure, with random weights: the paper's, and smaller ones."""

from dataclasses import dataclass
from typing import Any

from transformers import GPT2Config, PreTrainedConfig, T5Config

from plugbridge.memory.sizes import check_shapes


@dataclass(frozen=True)
class Shape:
    """A pair's shapes, and the batch that they read; `paper` is the table of Jin et al. 2023 with these numbers."""

    name: str
    large: PreTrainedConfig
    small: PreTrainedConfig
    batch: int
    length: int
    paper: str | None = None


def gpt2(hidden: int, layers: int, heads: int, vocabulary: int = 50257, positions: int = 1024) -> GPT2Config:
    """A GPT-2 without dropout."""
    return GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocabulary, n_positions=positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def t5(hidden: int, layers: int, heads: int, head_dim: int, ffn: int, vocabulary: int = 32128) -> T5Config:
    """A T5 v1.0 without dropout."""
    ends: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5Config(
        d_model=hidden, num_layers=layers, num_decoder_layers=layers, num_heads=heads, d_kv=head_dim, d_ff=ffn,
        vocab_size=vocabulary, dropout_rate=0.0, **ends,
    )  # fmt: skip


SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": (
        Shape("GPT-2-shaped, 8 x 512", gpt2(512, 8, 8, 8192, 256), gpt2(256, 4, 4, 8192, 256), 8, 128),
        Shape("T5-shaped, 4 + 4 x 512", t5(512, 4, 8, 64, 2048, 8192), t5(256, 2, 4, 64, 1024, 8192), 8, 128),
    ),
    "check": (
        Shape("GPT-2-shaped, 4 x 256", gpt2(256, 4, 4, 8192, 256), gpt2(128, 2, 2, 8192, 256), 8, 128),
        Shape("GPT-2-shaped, 8 x 512", gpt2(512, 8, 8, 8192, 256), gpt2(256, 4, 4, 8192, 256), 8, 128),
        Shape("GPT-2-shaped, 12 x 768", gpt2(768, 12, 12, 8192, 256), gpt2(512, 8, 8, 8192, 256), 8, 128),
    ),
    "paper": (
        Shape("GPT2-XL", gpt2(1600, 48, 25), gpt2(768, 12, 12), 8, 512, "Table 6"),
        Shape("T5-3B", t5(1024, 24, 32, 128, 16384), t5(768, 12, 12, 64, 3072), 1, 512, "Table 7"),
    ),
    "t5-11b": (Shape("T5-11B", t5(1024, 24, 128, 128, 65536), t5(1024, 24, 16, 64, 4096), 1, 512),),
    "tiny": (Shape("GPT-2-shaped, 2 x 16", gpt2(16, 2, 2, 64, 32), gpt2(8, 1, 2, 64, 32), 2, 16),),
}
"""Pairs by the name of their set."""

PUBLISHED: dict[str, PreTrainedConfig] = {
    "openai-community/gpt2": gpt2(768, 12, 12),
    "openai-community/gpt2-xl": gpt2(1600, 48, 25),
    "google-t5/t5-base": t5(768, 12, 12, 64, 3072),
    "google-t5/t5-large": t5(1024, 24, 16, 64, 4096),
    "google-t5/t5-3b": t5(1024, 24, 32, 128, 16384),
    "google-t5/t5-11b": t5(1024, 24, 128, 128, 65536),
}
"""The paper's models by their hub names: their published shapes (Radford et al. 2019; Raffel et al. 2020)."""

PAPER: dict[str, dict[str, int]] = {
    "Table 6": {
        "full fine-tuning": 73746, "Adapter": 57903, "Prefix tuning": 56051, "LoRA": 54593,
        "Ladder Side-Tuning": 17652, "ours: Adapter": 11203, "ours: Prefix tuning": 10745, "ours: LoRA": 10443,
    },
    "Table 7": {
        "full fine-tuning": 77465, "Adapter": 54324, "Prefix tuning": 53324, "LoRA": 52134,
        "Ladder Side-Tuning": 20385, "ours: Adapter": 15432, "ours: Prefix tuning": 15643, "ours: LoRA": 15323,
    },
}  # fmt: skip
"""MiB on one A100 as Jin et al. 2023 report them, by method; ours is their plug-in."""


def find_shapes(name: str) -> tuple[Shape, ...]:
    """A set of shapes by its name, or one of the paper's by its own, such as gpt2-xl. Raises ConfigError."""
    check_shapes(name)
    return {**SHAPES, **{shape.name.lower(): (shape,) for shape in SHAPES["paper"]}}[name]
