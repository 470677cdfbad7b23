"""The package's version, readable without importing the package, and those of the libraries results depend on."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

LIBRARIES = ("plugbridge", "torch", "transformers", "peft", "safetensors", "numpy", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES}


@functools.cache  # every stage notes them, and each is read from a file of many lines
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
