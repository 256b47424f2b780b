"""Adam."""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.heads.head import Gradient
from featcache.probes.solvers.rule import UpdateRule, per_probe
from featcache.probes.solvers.solver import DecayingSolver


class AdamSolver(DecayingSolver):
    """Base of Adam and AdamW."""

    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="how much of the mean square each step keeps")

    moments: ClassVar[int] = 2


class Adam(AdamSolver):
    """Adam, torch.optim.Adam's, with weight decay added to the gradient."""

    type: Literal["adam"] = "adam"

    capturable: ClassVar[bool] = True

    def rule(
        self, parameters: list[Tensor], solvers: Sequence[Self], precision: str, device: torch.device
    ) -> "AdamRule":
        """See MiniBatchSolver.rule."""
        return AdamRule(parameters, solvers, precision, device)


class AdamRule(UpdateRule):
    """torch.optim.Adam with beta1 0.9, eps 1e-8, and decay added to the gradient (Kingma & Ba, 2015)."""

    def __init__(self, parameters: list[Tensor], solvers: Sequence[AdamSolver], precision: str, device: torch.device):
        super().__init__(parameters, solvers, precision, device)
        self.beta2 = solvers[0].beta2
        self.first, self.second = self.zeros(), self.zeros()
        # 1 - beta^steps of the first moment, and the root of that of the second.
        self.correction1, self.correction2 = torch.zeros(2, device=device)

    def advance(self) -> None:
        """See Rule.advance."""
        super().advance()
        self.correction1.fill_(1 - 0.9**self.steps)
        self.correction2.fill_(math.sqrt(1 - self.beta2**self.steps))

    def state(self) -> dict[str, list[Tensor]]:
        """See Rule.state."""
        return {"first": self.first, "second": self.second}

    def update(self, number: int, parameter: Tensor, gradient: Gradient, rates: Tensor) -> None:
        self.move(number, parameter, self.decayed(number, gradient), rates)

    def move(self, number: int, parameter: Tensor, gradient: Tensor, rates: Tensor) -> None:
        """Move a parameter by a dense gradient."""
        first, second = self.first[number], self.second[number]
        first.lerp_(gradient, 0.1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=round(1 - self.beta2, 15))
        # w - rate (m / c1) / (sqrt(s) / c2 + eps), with each probe's numbers moved into the divisor to save passes
        # over memory. The gradient's memory is free by now. A rate may be 0.
        steep = self.correction1 / rates.clamp(min=1e-30)
        root = torch.sqrt(second, out=gradient)
        root = torch.addcmul(per_probe(1e-8 * steep, root), root, per_probe(steep / self.correction2, root), out=root)
        parameter.addcdiv_(first, root, value=-1)
