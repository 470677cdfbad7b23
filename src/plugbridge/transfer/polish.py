"""Polish: a few scalars of the plugged module, tuned on the large model by forward passes only.

One factor for each place that carries a module (stack, layer, site), found by CMA-ES (Hansen and
Ostermeier 2001) on the training loss; the factors are folded into the checkpoint.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from plugbridge.errors import TrainingDiverged
from plugbridge.tuners.module import Module, Slot
from plugbridge.tuners.table import Method

Factors = dict[str, float]
STEP = 0.2
"""First standard deviation of the factors' logarithms."""


def place_key(slot: Slot) -> str:
    """The factor that a slot belongs to."""
    return f"{slot.stack}:{slot.layer}:{slot.site}"


def places_of(module: Mapping[Slot, Tensor]) -> list[str]:
    """All factors of a module that is not zero, in order."""
    return list(dict.fromkeys(place_key(slot) for slot in sorted(module) if bool(module[slot].count_nonzero())))


def scaled(method: Method, module: Module, factors: Mapping[str, float]) -> Module:
    """A module whose effect is multiplied by a factor at each place; tensors that write carry it."""
    return {
        slot: tensor * factors.get(place_key(slot), 1.0) if slot.tensor in method.effect else tensor
        for slot, tensor in module.items()
    }


def search(
    places: Sequence[str], loss_of: Callable[[Factors], float], evaluations: int, seed: int, advance: Callable[[], None]
) -> tuple[Factors, list[float]]:
    """The best factors found, and the loss of every evaluation; the first is of factors all 1.

    Never worse than no polish on the loss that is given. A loss that is not finite is the worst there is; raises
    TrainingDiverged where the first one is.
    """
    import cma

    losses: list[float] = []

    def measured(logs: np.ndarray) -> float:
        loss = loss_of({place: float(np.exp(x)) for place, x in zip(places, logs, strict=True)})
        losses.append(loss if math.isfinite(loss) else math.inf)
        advance()
        if not math.isfinite(losses[0]):
            raise TrainingDiverged(f"polish: the loss is {loss} with factors of 1", learned=False)
        return losses[-1]

    best, lowest = np.zeros(len(places)), measured(np.zeros(len(places)))
    options = {"seed": seed + 1, "verbose": -9}  # cma takes seed 0 for "by the clock"
    strategy = cma.CMAEvolutionStrategy(np.zeros(len(places)), STEP, options)
    while len(losses) < evaluations:
        asked = strategy.ask()[: evaluations - len(losses)]
        found = [measured(np.asarray(logs)) for logs in asked]
        if min(found) < lowest:
            lowest, best = min(found), np.asarray(asked[int(np.argmin(found))])
        if len(asked) < strategy.popsize:
            break
        strategy.tell(asked, found)
    return {place: float(np.exp(x)) for place, x in zip(places, best, strict=True)}, losses
