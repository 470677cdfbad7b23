"""The embedded models and the demonstration's configuration: they come with the package.

In a checkout `plugbridge/pairs` links to the repository's `pairs/` and `configs/demo.yaml`; an installed package has
copies.
"""

from importlib.resources import files
from pathlib import Path

from plugbridge.errors import ModelError

DEMO = Path("demo")
"""What to give a command instead of a file for the demonstration's configuration."""


def embedded(name: str) -> Path:
    """A family's folder of an embedded small and large model, or a file beside it. Raises ModelError."""
    path = Path(str(files("plugbridge"))) / "pairs" / name
    if not path.exists():
        raise ModelError(f"{path} is not there: the installed package is not whole; install plugbridge again")
    return path


def config_file(given: Path) -> Path:
    """The configuration file that was given, or the demonstration's for ``demo`` where no such file is."""
    return embedded("demo.yaml") if given == DEMO and not given.exists() else given
