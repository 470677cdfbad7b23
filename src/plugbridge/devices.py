"""What the machine tells of its devices before torch is imported."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from plugbridge.errors import ModelError

CARDS = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")
"""Device files of cards that torch can call CUDA, on Linux."""


def surely_no_card(devices: Path = Path("/dev")) -> bool:
    """Whether torch can see no CUDA card here: it was built for processors, or there is no device file of any card."""
    try:
        if version("torch").endswith("+cpu"):
            return True
    except PackageNotFoundError:
        pass
    return sys.platform == "linux" and not any(next(devices.glob(name), None) for name in CARDS)


def check_device(name: str) -> None:
    """Refuse a device that is surely not there. Raises ModelError."""
    if name == "cuda" and surely_no_card():
        raise ModelError(NO_CARD)


NO_CARD = "device is 'cuda' but torch sees no CUDA card; use device: cpu"
