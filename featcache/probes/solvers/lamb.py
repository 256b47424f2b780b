"""LAMB."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from featcache.probes.heads.head import Gradient
from featcache.probes.solvers.adam import AdamRule, AdamSolver
from featcache.probes.solvers.rule import norms, per_probe

EPS = 1e-6


class Lamb(AdamSolver):
    """LAMB (You et al., ICLR 2020), timm's: AdamW whose step is as long as the weights of each layer that decays."""

    type: Literal["lamb"] = "lamb"

    capturable: ClassVar[bool] = True

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "LambRule":
        """See MiniBatchSolver.rule."""
        return LambRule(parameters, solvers, precision, device)


class LambRule(AdamRule):
    """LAMB (You et al., 2020, algorithm 2) with beta1 0.9 and eps 1e-6, for each tensor w of each probe:

    u = m / (sqrt(s) + eps) + decay w with Adam's corrected moments m and s, w = w - rate |w| / |u| u. As in timm, the
    step is not scaled where |w| or |u| is 0, or the decay.
    """

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        dense, first, second = self.dense(number, gradient), self.first[number], self.second[number]
        first.lerp_(dense, 0.1)
        second.mul_(self.beta2).addcmul_(dense, dense, value=round(1 - self.beta2, 15))
        root = torch.sqrt(second, out=dense).div_(self.correction2).add_(EPS)
        step = (first / self.correction1).div_(root)
        decay = self.decay_of(number)
        if decay is not None:
            step.addcmul_(parameter, per_probe(decay, parameter))
            weight, length = norms(parameter), norms(step)
            adapted = (decay > 0) & (weight > 0) & (length > 0)
            rates = rates * torch.where(adapted, weight / length, 1.0)
        parameter.addcmul_(step, per_probe(rates, parameter), value=-1)
