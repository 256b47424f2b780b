"""Layer-wise adaptive rate scaling."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.heads.head import Gradient
from featcache.probes.part import Positive
from featcache.probes.solvers.momentum import MomentumSolver
from featcache.probes.solvers.rule import UpdateRule, norms, per_probe


class Lars(MomentumSolver):
    """LARS (You, Gitman & Ginsburg, 2017): SGD whose rate is adapted to each layer's weights and gradient."""

    type: Literal["lars"] = "lars"
    trust: Positive = Field(0.001, description="trust coefficient")
    form: Literal["paper", "moco_v3"] = Field(
        "paper", description="whose: the paper's, or that of MoCo v3 and MAE, whose momentum leaves out the rate"
    )

    per_probe: ClassVar[frozenset[str]] = MomentumSolver.per_probe | {"trust"}
    capturable: ClassVar[bool] = True

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "LarsRule":
        """See MiniBatchSolver.rule."""
        return LarsRule(parameters, solvers, precision, device)


class LarsRule(UpdateRule):
    """Layer-wise adaptive rates (You, Gitman & Ginsburg, 2017, algorithm 1), for each weight matrix of each probe:

    a = trust |w| / (|g| + decay |w|), v = momentum v + rate a (g + decay w), w = w - v; a = 1 where it is 0 or
    undefined. In MoCo v3's form a = trust |w| / |g + decay w|, v = momentum v + a (g + decay w), w = w - rate v.
    Biases, norms and a single attentive query are vectors, and neither decayed nor adapted, as in BYOL.
    """

    def __init__(self, parameters: list[Tensor], solvers: Sequence[Lars], precision: str, device: torch.device):
        super().__init__(parameters, solvers, precision, device)
        self.velocities = self.zeros()
        self.momenta = torch.tensor([s.momentum for s in solvers], device=device)
        self.trust = torch.tensor([s.trust for s in solvers], device=device)
        self.rate_outside = solvers[0].form == "moco_v3"

    def state(self) -> dict[str, list[Tensor]]:
        """See Rule.state."""
        return {"velocities": self.velocities}

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        dense = self.dense(number, gradient)
        scale = torch.ones_like(rates) if self.rate_outside else rates
        # [P, ...] of a matrix, or of a convolution.
        if parameter.ndim >= 3:
            weight, slope = norms(parameter), norms(dense)
            if self.decay is not None:
                dense = self.decayed(number, dense)
                slope = norms(dense) if self.rate_outside else slope + self.decay * weight
            adapted = self.trust * weight / slope
            scale = scale * torch.where((weight > 0) & (slope > 0), adapted, 1.0)
        velocity = self.velocities[number]
        velocity.mul_(per_probe(self.momenta, velocity)).addcmul_(dense, per_probe(scale, velocity))
        if self.rate_outside:
            parameter.addcmul_(velocity, per_probe(rates, velocity), value=-1)
        else:
            parameter.sub_(velocity)
