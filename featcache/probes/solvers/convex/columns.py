"""One-vs-rest problems for all classes, folds and decays, and their solutions."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featcache.probes.losses.curvature import LogisticCurvature, SeparateCurvature, SquaredHingeCurvature
from featcache.probes.solvers.convex.basis import Eigenbasis
from featcache.probes.solvers.convex.newton import TOLERANCE
from featcache.probes.solvers.convex.path import Path


@dataclass(frozen=True)
class Columns:
    """One-vs-rest problems: a column for each class, fold and decay.

    Column (c, f, p) minimises over w and b, with u_i = folds[i, c, f] weights[i, c] and y_i = targets[i, c],

        sum_i u_i loss(y_i (w x_i + b)) + decays[c, p] / 2 |w|^2

    where loss(m) is log(1 + exp(-m)) (`logistic`) or max(0, 1 - m)^2 (`squared_hinge`). Whether b is penalised like w
    is up to the Eigenbasis. So liblinear's cost C is a decay of 1 / C with the bias penalised, scikit-learn's C of
    LogisticRegression is a decay of 1 / C with a free bias, and a decay of the mean loss is N times as large here.

    targets: [N, C], 1 or -1, any dtype. decays: [P] for all classes, or [C, P]; at least 0. weights: at least 0,
    [N, C] or [N, 1], for example 0 where a label is difficult, or the weight of its class; None is 1 everywhere. folds: 0
    (or False) where an image is left out and 1 where it is trained on, [N, F] for all classes or [N, C, F] where each
    class has folds of its own, any dtype; None is one fold of all images. All on the device of the features.
    """

    loss: Literal["logistic", "squared_hinge"]
    targets: Tensor
    decays: Tensor
    weights: Tensor | None = None
    folds: Tensor | None = None


@dataclass(frozen=True)
class Solutions:
    """The solutions of Columns. C classes, F folds, P decays.

    weights: float32 [C, F, P, D], of the features as they were given. biases: float32 [C, F, P]. decisions: w x_i + b
    of every image, also of those that the fold leaves out, float32 [C, F, P, N], or None if they were not wanted.
    objectives: what Columns states, float64 [C, F, P].
    distance: a bound on |W - W*| / |W|, float64 [C, F, P], where W has the bias if it is penalised. The objective is then
    at most decay / 2 (distance |W|)^2 above its minimum. It is infinite without decay.
    gradient: the norm of the gradient over the largest that converges, float64 [C, F, P], at most 1 where a column
    converged. That is where the distance is within the tolerance, or the gradient is 1e-16 of its norm at zero, below
    which it is rounding. steps: Newton steps taken, int64 [C, F, P].
    """

    weights: Tensor
    biases: Tensor
    decisions: Tensor | None
    objectives: Tensor
    distance: Tensor
    gradient: Tensor
    steps: Tensor

    @property
    def converged(self) -> Tensor:
        """Which columns converged, bool [C, F, P]. The others ran out of steps, or of float64's digits."""
        return self.gradient <= 1


def solve(
    basis: Eigenbasis, columns: Columns, *, tolerance: float = TOLERANCE, steps: int = 1000, decisions: bool = True
) -> Solutions:
    """Solve all columns together, and return their Solutions. No column depends on its neighbours beyond the tolerance.

    basis: of the features, [N, D]; it may be shared by any number of calls. tolerance: of the distance to the optimum,
    relative to |W|. steps: most Newton steps of a column; see Solutions.converged. decisions: whether to return them.

        basis = Eigenbasis(features, bias="penalised")
        solutions = solve(basis, Columns("squared_hinge", 2.0 * labels - 1, 1 / costs, folds=folds))
        held_out = solutions.decisions[:, 0, :, ~folds[:, 0].bool()]  # [C, P, images that fold 0 leaves out]
    """
    groups = _Groups(columns)
    (count, classes), device = columns.targets.shape, columns.targets.device
    decays = columns.decays.double().expand(classes, -1)  # [C, P]
    shape = classes, groups.problems // classes, decays.shape[1]
    path = Path(basis, groups)
    group = torch.arange(groups.problems, device=device).repeat_interleave(shape[2])
    decay = decays.unsqueeze(1).expand(shape).flatten()
    dim = basis.as_probe(basis.spread.new_zeros(1, len(basis.spread)))[0].shape[1]
    size = len(group)
    result = Solutions(
        torch.empty(size, dim, device=device),
        torch.empty(size, device=device),
        torch.empty(size, count, device=device) if decisions else None,
        torch.empty_like(decay),
        torch.empty_like(decay),
        torch.empty_like(decay),
        torch.empty_like(group),
    )
    for places, optima in path.optima(group, decay, torch.full_like(group, steps), tolerance):
        weight, bias = basis.as_probe(optima.points[:, 0])
        result.weights[places], result.biases[places] = weight.float(), bias.float()
        if result.decisions is not None:
            result.decisions[places] = basis.along(optima.points)[:, 0].float()
        result.objectives[places], result.distance[places] = optima.objectives, optima.distance
        result.gradient[places], result.steps[places] = optima.gradient, optima.steps
    return Solutions(
        result.weights.unflatten(0, shape),
        result.biases.unflatten(0, shape),
        None if result.decisions is None else result.decisions.unflatten(0, shape),
        result.objectives.unflatten(0, shape),
        result.distance.unflatten(0, shape),
        result.gradient.unflatten(0, shape),
        result.steps.unflatten(0, shape),
    )


class _Groups(SeparateCurvature):
    """The problems of all classes and folds, fold by fold within a class. Their parts are made when they are taken."""

    def __init__(self, columns: Columns):
        targets, weights, folds = columns.targets, columns.weights, columns.folds
        weights = targets.new_ones(1, 1) if weights is None else weights
        folds = targets.new_ones(1, 1) if folds is None else folds
        self.loss = columns.loss
        self.targets, self.weights = targets.t(), weights.expand_as(targets).t()  # [C, N]
        folds = folds.unsqueeze(1) if folds.ndim == 2 else folds
        self.folds = folds.expand(*targets.shape, -1).permute(1, 2, 0)  # [C, F, N]
        self.problems = self.folds.shape[0] * self.folds.shape[1]

    def take(self, numbers: Tensor) -> SeparateCurvature:  # type: ignore[override]  # Its problems are of another class.
        """See Curvature.take."""
        folds = self.folds.shape[1]
        kind = numbers // folds
        weights, targets = self.weights[kind].double() * self.folds[kind, numbers % folds], self.targets[kind].double()
        if self.loss == "squared_hinge":
            return SquaredHingeCurvature(weights, targets)
        return LogisticCurvature(weights * (1 + targets) / 2, weights * (1 - targets) / 2)
