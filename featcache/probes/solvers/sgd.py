"""Stochastic gradient descent with momentum."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.gemm import accumulate
from featcache.probes.heads.head import Gradient
from featcache.probes.part import Whole
from featcache.probes.solvers.momentum import MomentumSolver
from featcache.probes.solvers.rule import UpdateRule, per_probe
from featcache.probes.solvers.solver import DecayingSolver


class Sgd(MomentumSolver, DecayingSolver):
    """SGD with momentum, torch.optim.SGD's."""

    type: Literal["sgd"] = "sgd"
    nesterov: bool = Field(False, description="whether the step looks ahead along the momentum")

    capturable: ClassVar[bool] = True

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        return "optimizer.nesterov needs a momentum above 0" if self.nesterov and not self.momentum else None

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "SgdRule":
        """See MiniBatchSolver.rule."""
        return SgdRule(parameters, solvers, precision, device)


class SgdRule(UpdateRule):
    """torch.optim.SGD: v = momentum v + (g + decay w), w = w - rate v; Nesterov: rate (g + decay w + momentum v)."""

    def __init__(self, parameters: list[Tensor], solvers: Sequence[Sgd], precision: str, device: torch.device):
        super().__init__(parameters, solvers, precision, device)
        self.velocities = self.zeros()
        momenta = [s.momentum for s in solvers]
        self.momenta = torch.tensor(momenta, device=device)
        # If all probes have the same momentum, as they mostly do, the GEMM applies it.
        self.momentum = momenta[0] if len(set(momenta)) == 1 else None
        self.nesterov = solvers[0].nesterov

    def state(self) -> dict[str, list[Tensor]]:
        """See Rule.state."""
        return {"velocities": self.velocities}

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        velocity = move = self.velocities[number]
        if self.nesterov:
            dense = self.decayed(number, gradient)
            self._accumulate(velocity, dense)
            move = torch.addcmul(dense, velocity, per_probe(self.momenta, velocity))
        else:
            self._accumulate(velocity, gradient)
            decay = self.decay_of(number)
            if decay is not None:
                velocity.addcmul_(parameter, per_probe(decay, parameter))
        parameter.addcmul_(move, per_probe(rates, parameter), value=-1)

    def _accumulate(self, velocity: Tensor, gradient: Gradient) -> None:
        """Set v = momentum v + g in place."""
        momentum = self.momentum
        if momentum is None:
            velocity.mul_(per_probe(self.momenta, velocity))
            momentum = 1.0
        if not isinstance(gradient, tuple):
            velocity.mul_(momentum).add_(gradient.view(velocity.shape))
        elif gradient[0].ndim == 2:
            accumulate(velocity.flatten(0, -2), *gradient, momentum, self.precision)
        else:
            accumulate(velocity, *gradient, momentum, self.precision)
