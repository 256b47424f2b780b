"""LAMB."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from featcache.probes.heads.head import Gradient
from featcache.probes.solvers.adam import AdamRule
from featcache.probes.solvers.rule import norms, per_probe
from featcache.probes.solvers.solver import MiniBatchSolver

EPS = 1e-6


class Lamb(MiniBatchSolver):
    """LAMB (You et al., ICLR 2020), timm's: AdamW whose step is as long as the weights of each layer that decays."""

    type: Literal["lamb"] = "lamb"

    moments: ClassVar[int] = 2

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "LambRule":
        """See MiniBatchSolver.rule."""
        return LambRule(parameters, solvers, precision, device)


class LambRule(AdamRule):
    """LAMB (You et al., 2020, algorithm 2) with betas 0.9 and 0.999 and eps 1e-6, for each tensor w of each probe:

    u = m / (sqrt(s) + eps) + decay w with Adam's corrected moments m and s, w = w - rate |w| / |u| u. As in timm, the
    step is not scaled where |w| or |u| is 0, or the decay.
    """

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        dense, first, second = self.dense(number, gradient), self.first[number], self.second[number]
        first.lerp_(dense, 0.1)
        second.mul_(0.999).addcmul_(dense, dense, value=0.001)
        root = torch.sqrt(second, out=dense).div_((1 - 0.999**self.steps) ** 0.5).add_(EPS)
        step = (first / (1 - 0.9**self.steps)).div_(root)
        if self.decay is not None:
            step.addcmul_(parameter, per_probe(self.decay, parameter))
            weight, length = norms(parameter), norms(step)
            adapted = (self.decay > 0) & (weight > 0) & (length > 0)
            rates = rates * torch.where(adapted, weight / length, 1.0)
        parameter.addcmul_(step, per_probe(rates, parameter), value=-1)
