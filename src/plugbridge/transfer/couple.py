"""The coupling modes: training module, plug and Bridge together (Jin et al. 2023, Algorithm 1, lines 5 to 7).

A mode is one function behind one name: it takes a `Coupling` and returns the loss of a batch. What
trains is in the coupling's dictionaries, whatever the mode.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plugbridge.errors import ConfigError
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.feedback import feedback
from plugbridge.transfer.standalone import standalone


@dataclass(frozen=True)
class Mode:
    """One coupling mode: whether it runs the large model (forward only), and whether the Bridge can train."""

    name: str
    title: str
    start: Callable[[Coupling], Loss]
    runs_large: bool
    trains_bridge: bool


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("standalone", "the Bridge reads the tokens by itself", standalone, runs_large=False, trains_bridge=True),
        Mode(
            "feedback",
            "the large model runs forward, the error returns through the Bridge",
            feedback,
            runs_large=True,
            trains_bridge=False,
        ),
    )
}


def find_mode(name: str) -> Mode:
    """A coupling mode by name. Raises ConfigError."""
    if name not in MODES:
        raise ConfigError(f"no coupling mode '{name}'; known: {', '.join(MODES)}")
    return MODES[name]
