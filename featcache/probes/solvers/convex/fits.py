"""Full-batch training of a grid's linear probes.

A probe minimises the mean loss over all images plus weight_decay / 2 |W|^2, without the bias. With `ce` on single-label
data this is scikit-learn's LogisticRegression with C = 1 / (N weight_decay).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from featcache.probes.heads.linear import Linear
from featcache.probes.losses.curvature import Curvature
from featcache.probes.losses.loss import Loss, LossFunction
from featcache.probes.solvers.convex.basis import Eigenbasis
from featcache.probes.solvers.convex.newton import TOLERANCE, ratio
from featcache.probes.solvers.convex.path import Path
from featcache.probes.solvers.solver import Fit, Optimality


@dataclass(frozen=True)
class Problem:
    """What a linear probe minimises, loss plus decay / 2 |W|^2, and the largest number of Newton steps.

    fold: the fold of the images that it does not learn from, or None.
    """

    loss: Loss
    decay: float
    iterations: int
    fold: str | None = None


def fit_convex(
    problems: list[Problem],
    head: Linear,
    features: Tensor,
    labels: Tensor,
    classes: int,
    held_out: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[Fit]:
    """Solve problems of linear probes that share features and head, and return a Fit of each.

    features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N], same device. held_out: {fold: the rows that it
    holds out, int64 [n]}. All folds share one Eigenbasis, that of all images. The losses of a Fit are those of the
    Newton steps at the problem's own decay.
    """
    basis = Eigenbasis(features, "free" if head.bias else "none", 1 / head.temperature)
    fits: dict[Problem, Fit] = {}
    for loss in dict.fromkeys(problem.loss for problem in problems):
        alike = list(dict.fromkeys(problem for problem in problems if problem.loss == loss))
        if basis.finite:
            fits |= zip(alike, _fit(alike, basis, head, labels, classes, held_out), strict=True)
        else:
            nan = torch.full((classes, features.shape[1]), torch.nan)
            weights = {"fc0.weight": nan} | ({"fc0.bias": nan[:, 0]} if head.bias else {})
            fits |= {problem: Fit(weights, [math.nan], True) for problem in alike}
    return [replace(fits[p], weights={name: w.clone() for name, w in fits[p].weights.items()}) for p in problems]


def _fit(
    problems: list[Problem],
    basis: Eigenbasis,
    head: Linear,
    labels: Tensor,
    classes: int,
    held_out: Mapping[str, Tensor],
) -> list[Fit]:
    """Solve problems of one loss."""
    loss, device = problems[0].loss, labels.device
    folds = list(dict.fromkeys(problem.fold for problem in problems))
    curvature = (
        loss.curvature(LossFunction(loss, labels, classes), labels)
        if folds == [None]
        else Folds(
            loss,
            labels,
            classes,
            [held_out[fold] if fold else labels.new_empty(0, dtype=torch.int64) for fold in folds],
        )
    )
    path = Path(basis, curvature, head.shift)
    parts = curvature.problems // len(folds)
    numbers = torch.cat(
        [torch.arange(parts, device=device) + parts * folds.index(problem.fold) for problem in problems]
    )
    decay, steps = (
        torch.tensor(values, device=device, dtype=dtype).repeat_interleave(parts)
        for values, dtype in (
            ([p.decay for p in problems], torch.float64),
            ([p.iterations for p in problems], torch.int64),
        )
    )
    pieces: dict[int, _Piece] = {}
    for places, optima in path.optima(numbers, decay, steps):
        weight, bias = basis.as_weights(optima.points.flatten(0, 1))
        fields = (weight.unflatten(0, optima.points.shape[:2]), bias.unflatten(0, optima.points.shape[:2]),
                  optima.losses.t(), optima.steps, optima.away, optima.gradient)  # fmt: skip
        rows = zip(*(field.cpu() for field in fields), strict=True)
        pieces |= {place: _Piece(*row) for place, row in zip(places.tolist(), rows, strict=True)}
    return [
        _joined([pieces[place] for place in range(start, start + parts)], head.bias, curvature.convex)
        for start in range(0, len(numbers), parts)
    ]


class Folds(Curvature):
    """A convex loss of several folds of the images, fold after fold. The parts of its problems are made when taken.

    held_out: of each fold, the rows that it does not learn from, int64 [n].
    """

    convex = True

    def __init__(self, loss: Loss, labels: Tensor, classes: int, held_out: Sequence[Tensor]):
        self.loss, self.labels, self.classes, self.held_out = loss, labels, classes, held_out
        first = self._of(0)
        self.of_fold, self.columns = first.problems, first.columns
        self.problems = self.of_fold * len(held_out)

    def _of(self, fold: int) -> Curvature:
        learned = torch.ones(len(self.labels), dtype=torch.bool, device=self.labels.device)
        learned[self.held_out[fold]] = False
        labels = self.labels[learned]
        function = LossFunction(self.loss, labels, self.classes)
        return self.loss.curvature(function, labels).among(learned.nonzero()[:, 0], len(self.labels))

    def take(self, numbers: Tensor) -> Curvature:
        """See Curvature.take."""
        distinct, places = numbers.unique(return_inverse=True)
        folds = distinct // self.of_fold
        parts = [self._of(fold).take(distinct[folds == fold] % self.of_fold) for fold in folds.unique().tolist()]
        return type(parts[0]).joined(parts).take(places)


class _Piece(NamedTuple):
    """The solution of one problem, which is some or all classes of a probe: the fields of Optima on the CPU."""

    weight: Tensor  # [R, D]
    bias: Tensor  # [R]
    losses: Tensor  # [T]
    steps: Tensor
    away: Tensor
    gradient: Tensor


def _joined(pieces: list[_Piece], bias: bool, convex: bool) -> Fit:
    """Return the Fit of a probe. convex: whether its loss is, without which the distance is not known."""
    weight = torch.cat([piece.weight for piece in pieces])
    last = max(int(piece.steps) for piece in pieces)
    # A problem that ended early keeps its last loss.
    losses = sum(piece.losses[torch.arange(last + 1).clamp(max=int(piece.steps))] for piece in pieces)
    away = torch.stack([piece.away for piece in pieces]).norm()
    distance = float(ratio(away, weight.norm())) if convex else math.inf
    gradient = max(float(piece.gradient) for piece in pieces)
    weights = {"fc0.weight": weight.float()}
    if bias:
        weights["fc0.bias"] = torch.cat([piece.bias for piece in pieces]).float()
    # A class that is far from its optimum may be a small part of the probe; without decay no distance is known.
    converged = distance <= TOLERANCE if math.isfinite(distance) else gradient <= 1
    return Fit(weights, torch.as_tensor(losses).tolist(), converged, optimality=Optimality(distance, gradient))
