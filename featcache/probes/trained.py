"""The result of training a probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from featcache.probes.solvers.solver import Choice, Optimality
from featcache.probes.spec import ProbeSpec

# The only tensor of a probe that trains nothing and learns from some of the images: their rows, sorted int64.
ROWS = "rows"


@dataclass(frozen=True, repr=False)
class TrainedProbe:
    """The result of training a probe.

    weights: {name: float32 CPU tensor}. losses: mean training loss of every epoch. diverged: the step (from 0, over all
    epochs) at which the loss stopped being finite, or None; if it did, the weights are NaN. epoch: the epoch after
    which the weights were taken. scores: the selection metric after every epoch, NaN where it was not computed.
    stopped: what ended training early ("patience", "halving", or "iterations" of a full-batch optimizer), or None.
    choice: the regularisation of each class, where the optimizer chose it.
    optimality: how far from its optimum a probe of a full-batch optimizer is, or None.
    """

    spec: ProbeSpec
    weights: dict[str, Tensor]
    losses: list[float]
    diverged: int | None
    epoch: int | None = None
    scores: Sequence[float] = ()
    stopped: str | None = None
    choice: Choice | None = None
    optimality: Optimality | None = None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in self.weights.items())
        return f"TrainedProbe({self.spec.id}, {shapes})"

    @property
    def diverged_epoch(self) -> int | None:
        """The epoch, from 1, in which the probe diverged, or None."""
        if self.diverged is None:
            return None
        return next((n for n, loss in enumerate(self.losses, 1) if not math.isfinite(loss)), len(self.losses))
