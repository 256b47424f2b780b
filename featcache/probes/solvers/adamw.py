"""AdamW."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from featcache.probes.heads.head import Gradient
from featcache.probes.solvers.adam import AdamRule, AdamSolver
from featcache.probes.solvers.rule import per_probe


class AdamW(AdamSolver):
    """AdamW, torch.optim.AdamW's: Adam with weight decay apart from the gradient."""

    type: Literal["adamw"] = "adamw"

    capturable: ClassVar[bool] = True

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "AdamWRule":
        """See MiniBatchSolver.rule."""
        return AdamWRule(parameters, solvers, precision, device)


class AdamWRule(AdamRule):
    """torch.optim.AdamW: Adam, after w = (1 - rate decay) w (Loshchilov & Hutter, ICLR 2019)."""

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        decay = self.decay_of(number)
        if decay is not None:
            parameter.mul_(per_probe(1 - rates * decay, parameter))
        self.move(number, parameter, self.dense(number, gradient), rates)
