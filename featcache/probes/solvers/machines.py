"""Linear support vector machines, many at once: what solves them, how good a solution is, and which cost a class gets.

A machine minimises 1/2 |w|^2 + C sum_i s_i max(0, 1 - y_i (w x_i))^2 over the images of its problem. y_i is 1 or -1,
and s_i is the weight of positives, or 1. The bias is the weight of one more feature, which is always 1, and is part of
|w|, as in liblinear (Fan et al., JMLR 2008).
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from featcache.probes.scores.average_precision import average_precision
from featcache.probes.solvers.stratified import stratified_folds

# Bytes of decision values that are held at a time.
HELD_BYTES = 256 << 20


class Machines(Protocol):
    """What trains machines on one set of features, float64 [N, D], with or without a bias."""

    features: Tensor
    bias: bool

    def solve(
        self, signs: Tensor, numbers: Tensor, costs: Tensor, positive_weight: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Train Q machines: (weights float64 [Q, D], with the bias as a last column if there is one; bool [Q]).

        signs: int8 [M, N], of M problems: 1 or -1, and 0 for images that a problem does not have. numbers: int64 [Q],
        the problem of each machine. costs: float64 [Q]. iterations: most steps of a machine. The second result says
        which have converged.
        """


def decisions(machines: Machines, weights: Tensor) -> Tensor:
    """Return the decision values of all images, float64 [Q, N]. weights: of Q machines, as from solve()."""
    if not machines.bias:
        return weights @ machines.features.t()
    return torch.addmm(weights[:, -1:], weights[:, :-1], machines.features.t())


def excess(
    machines: Machines, signs: Tensor, costs: Tensor, positive_weight: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the largest share by which each objective may exceed its minimum, and the sum of its losses; [Q] each.

    signs: int8 [Q, N], of each machine. The objective is at least as steep as |w|^2 / 2 everywhere, so at a gradient g
    it is at most |g|^2 / 2 above its minimum.
    """
    bounds, losses = [], []
    size = max(HELD_BYTES // (32 * signs.shape[1]), 1)
    for own, cost, weight in zip(signs.split(size), costs.split(size), weights.split(size), strict=True):
        sign = own.to(weight)
        short = (1 - sign * decisions(machines, weight)).clamp_(min=0).mul_(sign)
        scale = torch.where(own > 0, positive_weight, 1.0).to(weight)
        loss = (scale * short.square()).sum(1)
        push = (scale * short).mul_(-2 * cost.unsqueeze(1))
        gradient = push @ machines.features
        if machines.bias:
            gradient = torch.cat([gradient, push.sum(1, keepdim=True)], dim=1)
        slack = (gradient + weight).square().sum(1) / 2
        bounds.append(slack / (weight.square().sum(1) / 2 + cost * loss))
        losses.append(loss)
    return torch.cat(bounds), torch.cat(losses)


def folds_of(signs: np.ndarray, folds: int) -> tuple[np.ndarray, int]:
    """Return the fold of each image, int64 [N], -1 for those that are not in the problem; and the number of folds.

    signs: int8 [N] of one problem. Each fold needs a positive and a negative, so there are no more folds than that.
    """
    used = signs != 0
    count = min(folds, int((signs == 1).sum()), int((signs == -1).sum()))
    numbers = np.full(len(signs), -1, np.int64)
    if count > 1:
        numbers[used] = stratified_folds(signs[used] == 1, count)
    return numbers, count


def cross_validated(
    machines: Machines, signs: Tensor, costs: Tensor, folds: int, positive_weight: float, iterations: int
) -> tuple[Tensor, list[int]]:
    """Return the average precision of each class and cost, the mean over held-out folds: float64 [C, K]; and the folds.

    signs: int8 [C, N]. costs: float64 [K]. The second result is how many folds each class has. A class with fewer than
    two has no average precision, and NaN.
    """
    places, counts = zip(*(folds_of(row, folds) for row in signs.cpu().numpy()), strict=True)
    held = [(c, fold) for c, count in enumerate(counts) if count > 1 for fold in range(count)]
    table = torch.full((len(signs), len(costs)), torch.nan, dtype=torch.float64)
    if not held:
        return table, list(counts)
    masks = torch.from_numpy(np.stack([places[c] == fold for c, fold in held])).to(signs.device)  # [M, N]
    problems = signs[[c for c, _ in held]].masked_fill(masks, 0)
    numbers = torch.arange(len(held), device=signs.device).repeat_interleave(len(costs))
    weights, _ = machines.solve(problems, numbers, costs.repeat(len(held)), positive_weight, iterations)
    values = torch.zeros_like(table)
    for (c, _), mask, own in zip(held, masks, weights.split(len(costs)), strict=True):
        rows = mask.nonzero()[:, 0]
        features = machines.features[rows]
        logits = own[:, :-1] @ features.t() + own[:, -1:] if machines.bias else own @ features.t()
        values[c] += average_precision(logits, signs[c, rows] == 1)[0].cpu()
    for c in {c for c, _ in held}:
        table[c] = values[c] / counts[c]
    return table, list(counts)
