"""The coupling modes: training module, plug and Bridge together (Jin et al. 2023, Algorithm 1, lines 5 to 7).

A mode is one function behind one name: it takes a `Coupling` and returns the loss of a batch. What
trains is in the coupling's dictionaries, whatever the mode. A mode's function is imported when it is called: the table
itself, and every check by it, needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from plugbridge.config.stages import OptimizerName
from plugbridge.errors import ConfigError
from plugbridge.families.spec import Layout
from plugbridge.parsing import shown

if TYPE_CHECKING:
    from plugbridge.transfer.coupling import Coupling, Loss
    from plugbridge.transfer.ladder import Rungs

StartKind = Literal["random", "ridge", "procrustes", "fresh"]


@dataclass(frozen=True)
class Mode:
    """One coupling mode.

    `runs_large`: whether it runs the large model (forward only but where it is `exact`). `trains_bridge`: whether the
    Bridge can train. `reads_alone`: whether the Bridge reads tokens by itself, which a projected one cannot.
    `reads_tokens`: whether the Bridge's own embeddings and head are used; where they are not, they are dropped
    and not counted. `has_bridge`: whether there is one at all. `exact`: whether the error goes back through the large
    model itself, in training mode, all parts of a step together. `caches`: where the large model's activations may be
    kept from.
    `passes`: forward passes of the large model in a step where it runs.
    `plug` and `layers` are the defaults: what did best on validation rows (docs/results/coupling_choices.md).
    `optimizer` is the default where the Bridge trains.
    """

    name: str
    title: str
    start: Callable[["Coupling"], "Loss"]
    runs_large: bool
    trains_bridge: bool
    reads_alone: bool
    reads_tokens: bool = False
    has_bridge: bool = True
    exact: bool = False
    caches: Callable[[Layout], "Rungs"] | None = None
    passes: int = 1
    plug: StartKind = "fresh"
    layers: float = 1.0
    optimizer: OptimizerName = "adamw"


def _standalone(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.standalone import standalone

    return standalone(coupling)


def _ladder(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.ladder import ladder

    return ladder(coupling)


def _ladder_delta(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.ladder import ladder_delta

    return ladder_delta(coupling)


def _feedback(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.feedback import feedback

    return feedback(coupling)


def _identity(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.feedback import identity

    return identity(coupling)


def _mezo(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.mezo import mezo

    return mezo(coupling)


def _backprop(coupling: "Coupling") -> "Loss":
    from plugbridge.transfer.backprop import backprop

    return backprop(coupling)


def _rungs_of(layout: Layout) -> "Rungs":
    from plugbridge.transfer.ladder import rungs_of

    return rungs_of(layout)


def _norm_rungs(layout: Layout) -> "Rungs":
    from plugbridge.transfer.ladder import norm_rungs

    return norm_rungs(layout)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "standalone",
            "the Bridge reads the tokens by itself",
            _standalone,
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
            _ladder,
            runs_large=True,
            trains_bridge=True,
            reads_alone=False,
            reads_tokens=True,
            caches=_rungs_of,
        ),
        Mode(
            "ladder_delta",
            "as ladder, with a Bridge that stays as it is and carries only what the module changes",
            _ladder_delta,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            layers=0.5,
            caches=_norm_rungs,
        ),
        Mode(
            "feedback",
            "the large model runs forward, the error returns through the Bridge",
            _feedback,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            layers=0.75,
        ),
        Mode(
            "identity",
            "a control: feedback without a Bridge, the last error goes to every layer unchanged",
            _identity,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            has_bridge=False,
            layers=0.75,
        ),
        Mode(
            "mezo",
            "no Bridge: the large model's forward passes alone tune the module",
            _mezo,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            has_bridge=False,
            passes=2,
        ),
        Mode(
            "backprop",
            "no Bridge: exact gradients through the large model, block by block; with load_in: 4bit this is QLoRA",
            _backprop,
            runs_large=True,
            trains_bridge=False,
            reads_alone=False,
            has_bridge=False,
            exact=True,
        ),
    )
}


def find_mode(name: str) -> Mode:
    """A coupling mode by name. Raises ConfigError."""
    if name not in MODES:
        raise ConfigError(f"no coupling mode {shown(name)}; known: {', '.join(MODES)}")
    return MODES[name]
