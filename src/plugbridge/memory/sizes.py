"""Bytes as people write them."""

import re

from plugbridge.errors import ConfigError
from plugbridge.parsing import shown

MOST = 2**60
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """``8GB``, ``8G`` or ``512MiB`` as bytes, in powers of 1,024 as memory is sold. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    number = float(found[1]) * UNITS[found[2].upper()] if found is not None and len(text) < 40 else 0
    if not 1 <= number <= MOST:
        raise ConfigError(f"{shown(text, 40)} is no amount of memory; expected one such as 8GB or 512MB")
    return int(number)


SHAPES = ("small", "check", "paper", "t5-11b", "tiny", "gpt2-xl", "t5-3b")
"""Sets of shapes by name (`shapes.find_shapes`), the last two each one of the paper's."""


def check_shapes(name: str) -> None:
    """Refuse a set of shapes that there is not, without importing what makes them. Raises ConfigError."""
    if name not in SHAPES:
        raise ConfigError(f"no shapes {shown(name)}; known: {', '.join(SHAPES)}")
