"""Amounts of memory as people write them."""

import pytest

from plugbridge.errors import ConfigError
from plugbridge.memory.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "value"), [("8GB", 2**33), ("1.5 GiB", 3 * 2**29), ("512m", 2**29), ("100", 100), ("1T", 2**40)]
)
def test_amounts(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 bytes", "0GB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount of memory"):
        parse_bytes(text)
