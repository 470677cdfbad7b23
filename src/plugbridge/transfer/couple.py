"""The coupling modes: training module, plug and Bridge together (Jin et al. 2023, Algorithm 1, lines 5 to 7).

A mode is one function behind one name: it takes a `Coupling` and returns the loss of a batch. What
trains is in the coupling's dictionaries, whatever the mode.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plugbridge.config.stages import OptimizerName
from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout
from plugbridge.transfer.coupling import Coupling, Loss
from plugbridge.transfer.feedback import feedback, identity
from plugbridge.transfer.ladder import Rungs, ladder, ladder_delta, norm_rungs, rungs_of
from plugbridge.transfer.standalone import standalone
from plugbridge.transfer.start import StartKind


@dataclass(frozen=True)
class Mode:
    """One coupling mode.

    `runs_large`: whether it runs the large model (forward only). `trains_bridge`: whether the Bridge
    can train. `reads_alone`: whether the Bridge reads tokens by itself, which a projected one cannot.
    `reads_tokens`: whether the Bridge's own embeddings and head are used; where they are not, they are dropped
    and not counted. `caches`: where the large model's activations may be kept from.
    `plug` and `layers` are the defaults: what did best on validation rows (docs/results/coupling_choices.md).
    `optimizer` is the default where the Bridge trains.
    """

    name: str
    title: str
    start: Callable[[Coupling], Loss]
    runs_large: bool
    trains_bridge: bool
    reads_alone: bool
    reads_tokens: bool = False
    caches: Callable[[Layout], Rungs] | None = None
    plug: StartKind = "fresh"
    layers: float = 1.0
    optimizer: OptimizerName = "adamw"


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "standalone",
            "the Bridge reads the tokens by itself",
            standalone,
            runs_large=False,
            trains_bridge=True,
            reads_alone=True,
            reads_tokens=True,
            plug="random",
            optimizer="adafactor",
        ),
        Mode(
            "ladder",
            "the large model runs forward, its activations enter the Bridge",
            ladder,
            runs_large=True,
            trains_bridge=True,
            reads_alone=False,
            reads_tokens=True,
            caches=rungs_of,
        ),
        Mode(
            "ladder_delta",
            "as ladder, with a Bridge that stays as it is and carries only what the module changes",
            ladder_delta,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            layers=0.5,
            caches=norm_rungs,
        ),
        Mode(
            "feedback",
            "the large model runs forward, the error returns through the Bridge",
            feedback,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            layers=0.75,
        ),
        Mode(
            "identity",
            "a control: feedback without a Bridge, the last error goes to every layer unchanged",
            identity,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            layers=0.75,
        ),
    )
}


def find_mode(name: str) -> Mode:
    """A coupling mode by name. Raises ConfigError."""
    if name not in MODES:
        raise ConfigError(f"no coupling mode '{name}'; known: {', '.join(MODES)}")
    return MODES[name]
