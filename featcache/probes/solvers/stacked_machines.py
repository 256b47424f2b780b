"""Support vector machines of all classes, folds and costs together, by the solver of convex problems."""

import torch
from torch import Tensor

from featcache.probes.solvers.convex import Columns, Eigenbasis, solve


class StackedMachines:
    """Machines that share the eigenbasis of their features. See Machines."""

    def __init__(self, features: Tensor, bias: bool):
        self.features, self.bias = features, bias
        self._basis = Eigenbasis(features, "penalised" if bias else "none")

    def solve(
        self, signs: Tensor, costs: Tensor, parts: Tensor, positive_weight: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """See Machines.solve. A cost C is a decay of 1 / C."""
        columns = Columns(
            "squared_hinge",
            torch.where(signs > 0, 1, -1).t(),
            1 / costs,
            weights=torch.where(signs > 0, positive_weight, (signs < 0).double()).t(),
            folds=parts.permute(2, 0, 1),
        )
        found = solve(self._basis, columns, steps=iterations, decisions=False)
        weights = found.weights.double()
        if self.bias:
            weights = torch.cat([weights, found.biases.double().unsqueeze(-1)], dim=-1)
        return weights, found.converged
