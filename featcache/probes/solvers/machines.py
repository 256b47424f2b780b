"""Linear support vector machines: what trains many of them, how good they are, and which cost each class gets.

A machine minimises 1/2 |w|^2 + C sum_i s_i max(0, 1 - y_i (w x_i))^2 over its images. y_i is 1 or -1, and s_i is the
weight of positives, or 1. The bias is the weight of one more feature, which is always 1, and is part of |w|, as in
liblinear (Fan et al., JMLR 2008).
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from featcache.probes.scores.average_precision import average_precision
from featcache.probes.solvers.stratified import stratified_folds


class Machines(Protocol):
    """What trains machines on one set of features, float64 [N, D], with or without a bias."""

    features: Tensor
    bias: bool

    def solve(
        self, signs: Tensor, costs: Tensor, parts: Tensor, positive_weight: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Train a machine for each of C classes, F parts of the images and P costs.

        signs: int8 [C, N], 1 or -1, and 0 for images that a class does not have. costs: float64 [C, P]. parts: bool
        [C, F, N], the images that a machine is trained on. iterations: most steps of a machine.

        Returns (weights float64 [C, F, P, D], with the bias as one more column if there is one; bool [C, F, P], which
        machines have converged).
        """


def decisions(machines: Machines, weights: Tensor, rows: Tensor | slice) -> Tensor:
    """Return the decision values of some images, float64 [Q, n]. weights: of Q machines, [Q, D] or [Q, D + 1]."""
    features = machines.features[rows]
    if not machines.bias:
        return weights @ features.t()
    return torch.addmm(weights[:, -1:], weights[:, :-1], features.t())


def excess(
    machines: Machines, signs: Tensor, costs: Tensor, positive_weight: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the largest share by which the objective of each machine may exceed its minimum, and the sum of its losses.

    signs: int8 [C, N]. costs: float64 [C]. weights: of a machine for each class. Both results are float64 [C]. The
    objective is everywhere at least as curved as |w|^2 / 2, so where its gradient is g, it is at most |g|^2 / 2 above
    its minimum.
    """
    sign = signs.to(weights)
    short = (1 - sign * decisions(machines, weights, slice(None))).clamp_(min=0).mul_(sign)
    scale = torch.where(signs > 0, positive_weight, 1.0).to(weights)
    loss = (scale * short.square()).sum(1)
    push = (scale * short).mul_(-2 * costs.unsqueeze(1))
    gradient = push @ machines.features
    if machines.bias:
        gradient = torch.cat([gradient, push.sum(1, keepdim=True)], dim=1)
    slack = (gradient + weights).square().sum(1) / 2
    return slack / (weights.square().sum(1) / 2 + costs * loss), loss


def cross_validated(
    machines: Machines, signs: Tensor, costs: Tensor, folds: int, positive_weight: float, iterations: int
) -> Tensor:
    """Return the average precision of each class and cost, the mean over the folds that are held out: float64 [C, P].

    signs: int8 [C, N], with a positive and a negative for each fold. costs: float64 [P]. folds: how many.
    """
    numbers = np.full(signs.shape, -1, np.int64)
    for number, row in zip(numbers, signs.cpu().numpy(), strict=True):
        number[row != 0] = stratified_folds(row[row != 0] == 1, folds)
    held = torch.from_numpy(numbers[:, None] == np.arange(folds)[:, None]).to(signs.device)  # [C, F, N]
    weights, _ = machines.solve(signs, costs.expand(len(signs), -1), ~held, positive_weight, iterations)
    table = torch.empty(len(signs), len(costs), dtype=torch.float64)
    for c, label in enumerate(signs):
        scores = []
        for own, mask in zip(weights[c], held[c], strict=True):
            rows = mask.nonzero()[:, 0]
            scores.append(average_precision(decisions(machines, own, rows), label[rows] == 1)[0])
        table[c] = torch.stack(scores).mean(0)
    return table
