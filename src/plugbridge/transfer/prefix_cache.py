"""A layer's prefix as its attention expects it: in a cache."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from plugbridge.families.spec import Layout


def layer_prefix(layout: Layout, seq2seq: bool, value: Tensor, layer: int, x: Tensor) -> Any:
    """A cache of one layer's prefix. value: (tokens, 2 x inner width), x: what the layer reads, (n, length, hidden)."""
    heads, head_dim = (layout.sizes[axis] for axis in layout.family.prefix.axes.split())
    kv = value.to(x.dtype).reshape(-1, 2, heads, head_dim).permute(1, 2, 0, 3)  # kv, heads, tokens, head_dim
    cache = DynamicCache()
    keys, values = (part.expand(x.shape[0], -1, -1, -1) for part in kv)
    cache.update(keys, values, layer)
    return EncoderDecoderCache(cache, DynamicCache()) if seq2seq else cache
