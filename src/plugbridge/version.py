"""The package's version, readable without importing the package, and those of the libraries results depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

LIBRARIES = ("plugbridge", "torch", "transformers", "peft", "safetensors", "numpy", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
