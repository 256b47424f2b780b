"""Full-batch training of linear probes by Newton's method, in an eigenbasis that all of them share.

Minimises the mean loss over all images plus weight_decay / 2 |W|^2, the bias left out, in float64. With `ce` on
single-label data that is scikit-learn's LogisticRegression with C = 1 / (N weight_decay).

The Hessian is X'DX + decay, with D the curvature of the loss at each image. It is close to mean(D) X'X + decay, which is
diagonal in the eigenbasis of X'X, whatever the class, the loss and the decay. With that as preconditioner, a few
products by conjugate gradients give a Newton step (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1). The
products are in float32, objectives and gradients in float64.

The weaker the decay, the harder the problem. An optimum is therefore sought from that of a stronger decay, down the
powers of ten. Probes share these stations, but what a probe ends with does not depend on which others there are.

A problem has converged once the norm of its gradient is at most 1e-5 weight_decay |W|. At a distance |W - W*| from the
optimum that norm is at least weight_decay |W - W*|, so steep does the decay make the objective: the distance is then at
most 1e-5 |W|, whatever the decay and the scale of the features.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featcache.probes.heads.linear import Linear
from featcache.probes.losses.curvature import Curvature
from featcache.probes.losses.loss import Loss, LossFunction

# Converged: the largest gradient over weight_decay |W|.
TOLERANCE = 1e-5
# Without decay there may be no optimum, but weights that grow for ever: over the gradient at the start.
UNDECAYED_TOLERANCE = 1e-7
# Less of the gradient at the start is the rounding of float64.
RESOLUTION = 1e-14
# A power of ten is left once its gradient is this share of what it began with, or after so many steps. There are at
# most so many powers; below them, and without decay, the way goes on from the last.
ROUGHLY, ROUGH_STEPS, POWERS = 0.03, 50, 10
# Conjugate gradients end at this share of the gradient, or after so many products.
INEXACT, PRODUCTS = 0.1, 500
# A step is taken if the objective falls by this share of what its slope promises (Armijo), but for rounding.
SUFFICIENT, ROUNDING, TRIALS = 1e-4, 1e-13, 40
# After so many steps without progress float64 can tell no more.
PATIENCE = 5
CHUNK_ROWS = 4096
# Images are kept in the eigenbasis if they take no more than this, and are else turned anew in every product.
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Problem:
    """What a linear probe minimises: a loss plus decay / 2 |W|^2, in so many Newton steps at most."""

    loss: Loss
    decay: float
    iterations: int


@dataclass(frozen=True)
class Fit:
    """The optimum of a problem.

    weights: {name: float32 CPU tensor}; NaN if the features are not all finite. losses: the mean losses before and
    after each of the last Newton steps, those at the problem's own decay. converged: False if the steps ran out.
    """

    weights: dict[str, Tensor]
    losses: list[float]
    converged: bool


def fit_convex(problems: list[Problem], head: Linear, features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
    """Solve problems of linear probes that share features and head, and return a Fit of each. All start from zero.

    features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N], same device.
    """
    basis = Eigenbasis(features, head.bias)
    paths: dict[Loss, _Path] = {}
    fits: dict[Problem, Fit] = {}
    for problem in dict.fromkeys(problems):
        loss = problem.loss
        if loss not in paths:
            function = LossFunction(loss, labels, classes)
            paths[loss] = _Path(basis, loss.curvature(function, labels), classes, head)
        fits[problem] = paths[loss].fit(problem.decay, problem.iterations)
    return [replace(fits[p], weights={name: w.clone() for name, w in fits[p].weights.items()}) for p in problems]


class Eigenbasis:
    """Images along the eigenvectors of the covariance of their features, [N, K], with a 1 for the bias behind.

    N images span a space of N directions, which the weights never leave, so that K = min(N, D), and one more with a
    bias. spread: the mean square along each direction, float64 [K]. finite: whether all features are.
    """

    def __init__(self, features: Tensor, bias: bool):
        self.features, self.bias = features, bias
        count, dim = features.shape
        mean = sum(rows.double().sum(0) for rows in features.split(CHUNK_ROWS)) / count
        self.mean = mean if bias else torch.zeros_like(mean)
        self.finite = bool(torch.isfinite(mean).all())
        centred = (rows.double() - self.mean for rows in features.split(CHUNK_ROWS))
        span = corner = None
        if not self.finite:
            square = torch.zeros_like(mean).diag()
        elif count <= dim:
            span, corner = torch.linalg.qr(torch.cat(list(centred)).t())  # [D, N], [N, N]
            square = corner @ corner.t()
        else:
            square = torch.zeros_like(mean).diag()
            for rows in centred:
                square.addmm_(rows.t(), rows)
        spread, turn = torch.linalg.eigh(square)
        self.spread = spread.clamp(min=0) / count
        self.directions = turn if span is None else span @ turn  # [D, K]
        self._rows = self._kept(turn, corner)
        if bias:
            self.spread = torch.cat([self.spread, self.spread.new_ones(1)])

    def _kept(self, turn: Tensor, corner: Tensor | None) -> dict[torch.dtype, Tensor] | None:
        """The images in the basis, {dtype: [N, K without bias]}, or None if they are too large."""
        if corner is not None:
            rows = corner.t() @ turn
        elif self.features.numel() * (8 + 4) <= KEPT_BYTES:
            rows = torch.cat([(rows.double() - self.mean) @ turn for rows in self.features.split(CHUNK_ROWS)])
        else:
            return None
        return {rows.dtype: rows, torch.float32: rows.float()}

    def along(self, points: Tensor) -> Tensor:
        """Products of all images with points [K, M], in their dtype: [N, M]."""
        if self._rows:
            weight = points[: len(self.directions.t())]
            rows = self._rows[points.dtype]
            return torch.addmm(points[-1:], rows, weight) if self.bias else rows @ weight
        weight, bias = self.as_weights(points)
        return torch.cat([rows.to(weight) @ weight for rows in self.features.split(CHUNK_ROWS)]).add_(bias)

    def pulled(self, pushes: Tensor) -> Tensor:
        """Products of all directions with what pulls at each image, [N, M], in its dtype: [K, M]."""
        if self._rows:
            weight = self._rows[pushes.dtype].t() @ pushes
        else:
            weight = torch.zeros(len(self.directions), pushes.shape[1]).to(pushes)
            for rows, push in zip(self.features.split(CHUNK_ROWS), pushes.split(CHUNK_ROWS), strict=True):
                weight.addmm_(rows.to(push).t(), push)
            weight = self.directions.to(pushes).t() @ (weight - self.mean.to(pushes).unsqueeze(1) * pushes.sum(0))
        return torch.cat([weight, pushes.sum(0, keepdim=True)]) if self.bias else weight

    def as_weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points [K, M] as weights [D, M] of the features themselves, and biases [M]."""
        weight = self.directions.to(points) @ points[: self.directions.shape[1]]
        shift = self.mean.to(points) @ weight
        return weight, points[-1] - shift if self.bias else -shift


class _Path:
    """The optima of one loss, from strong to weak decay."""

    def __init__(self, basis: Eigenbasis, problem: Curvature, classes: int, head: Linear):
        self.basis, self.problem, self.head = basis, problem, head
        self.stations: dict[int, Tensor] = {}
        self.start = basis.spread.new_zeros(len(basis.spread), classes)
        push, curvature = problem.slope(self._logits(self.start))
        slope = self._pulled(push)
        self.steep = problem.dot(slope, slope).sqrt()
        strongest = basis.spread[: basis.directions.shape[1]].max() * problem.flat(curvature).max()
        self.first = math.floor(math.log10(strongest)) if 0 < strongest < math.inf else 0

    def fit(self, decay: float, iterations: int) -> Fit:
        """Return the optimum at one decay."""
        if not self.basis.finite:
            point, losses, converged = torch.full_like(self.start, torch.nan), [math.nan], True
        else:
            point, losses, converged = self._minimise(self._station(decay), decay, iterations)
        weight, bias = self.basis.as_weights(point)
        weights = {"fc0.weight": weight.t().contiguous()} | ({"fc0.bias": bias} if self.basis.bias else {})
        return Fit({name: w.float().cpu() for name, w in weights.items()}, losses, converged)

    def _station(self, decay: float) -> Tensor:
        """The point from which to seek the optimum of a decay: about that of the next higher power of ten."""
        point = self.start
        for power in range(self.first, self.first - POWERS, -1):
            if 10.0**power <= decay:
                break
            if power not in self.stations:
                self.stations[power] = self._minimise(point, 10.0**power, ROUGH_STEPS, ROUGHLY)[0]
            point = self.stations[power]
        return point

    def _logits(self, point: Tensor) -> Tensor:
        return self.basis.along(point).div_(self.head.temperature).add_(self.head.offset)

    def _pulled(self, push: Tensor) -> Tensor:
        return self.basis.pulled(push).div_(self.head.temperature)

    def _minimise(
        self, point: Tensor, decay: float, steps: int, share: float = 0.0
    ) -> tuple[Tensor, list[float], bool]:
        """Take Newton steps from a point [K, C] until the gradient is small, or that share of what it was."""
        problem, basis = self.problem, self.basis
        penalty = torch.full_like(basis.spread, decay)
        penalty[self.basis.directions.shape[1] :] = 0
        logits, losses, stale = self._logits(point), [], 0
        least = self.steep * (RESOLUTION if decay else UNDECAYED_TOLERANCE)
        lowest = None
        for taken in range(steps + 1):
            value = problem.value(logits)
            losses.append(float(value.sum()))
            push, curvature = problem.slope(logits)
            decayed = penalty.unsqueeze(1) * point
            slope = self._pulled(push) + decayed
            norm, whole = problem.dot(slope, slope).sqrt(), value + problem.dot(decayed, point) / 2
            if lowest is None:
                least, lowest = torch.maximum(least, share * norm), (norm, whole)
            weight = problem.dot(decayed, decayed).sqrt()
            pending = norm > torch.maximum(TOLERANCE * weight, least)
            stale = stale + 1 if taken and not self._gained(norm, whole, lowest, pending) else 0
            lowest = torch.minimum(norm, lowest[0]), torch.minimum(whole, lowest[1])
            if not pending.any() or taken == steps or stale == PATIENCE:
                break
            step = self._newton(slope, curvature, penalty, pending)
            move = basis.along(step).div_(self.head.temperature)
            length = self._length(logits, move, (point, step, penalty), (whole, problem.dot(slope, step)), pending)
            point, logits = point + length * step, logits.add_(length * move)
        return point, losses, not pending.any()

    @staticmethod
    def _gained(norm: Tensor, whole: Tensor, lowest: tuple[Tensor, Tensor], pending: Tensor) -> bool:
        """Whether any pending problem has a smaller gradient, or a lower objective, than it ever had."""
        better = (norm < 0.9 * lowest[0]) | (whole < lowest[1] - 10 * ROUNDING * lowest[1].abs())
        return bool((better & pending).any())

    def _newton(self, slope: Tensor, curvature: Tensor, penalty: Tensor, pending: Tensor) -> Tensor:
        """Minus the inverse Hessian times the gradient, roughly, [K, C]; 0 where a problem is not pending."""
        dot = self.problem.dot
        # Near the optimum a gradient may be less than what float32 has numbers for.
        scale = slope.abs().amax()
        rest, curvature = (slope / -scale).float(), curvature.float()
        hessian = self.basis.spread.unsqueeze(1) / self.head.temperature**2 * self.problem.flat(curvature).double()
        hessian = hessian + penalty.unsqueeze(1)
        inverse = (1 / hessian.clamp(min=1e-10 * float(hessian.max()))).float()
        penalty = penalty.float().unsqueeze(1)
        step, better = torch.zeros_like(rest), self.problem.free(inverse * rest)
        direction, product = better, dot(rest, better)
        enough = INEXACT**2 * product
        for _ in range(PRODUCTS):
            move = self.basis.along(direction).div_(self.head.temperature)
            bent = self._pulled(self.problem.bend(curvature, move)).addcmul_(penalty, direction)
            length = dot(direction, bent)
            pending = pending & (length > 0)
            length = torch.where(pending, product / length, 0.0)
            step, rest = step.addcmul_(length, direction), rest.addcmul_(length, bent, value=-1)
            better = self.problem.free(inverse * rest)
            before, product = product, dot(rest, better)
            pending = pending & (product > enough)
            if not pending.any():
                break
            direction = better.addcmul(torch.where(pending, product / before, 0.0), direction)
        return step.double() * scale

    def _length(
        self,
        logits: Tensor,
        move: Tensor,
        line: tuple[Tensor, Tensor, Tensor],
        start: tuple[Tensor, Tensor],
        pending: Tensor,
    ) -> Tensor:
        """How much of a step to take, for each problem: all, or by halves or tenths until the objective has fallen.

        line: point, step, penalty. start: the objective, and its slope along the step.
        """
        (point, step, penalty), (whole, promise), dot = line, start, self.problem.dot
        pulling, bending = (dot(penalty.unsqueeze(1) * other, step) for other in (point, step))
        held = whole - self.problem.value(logits)
        length = pending.double()
        for _ in range(TRIALS):
            there = self.problem.value(logits + length * move) + held + length * (pulling + length / 2 * bending)
            reached = length * promise
            pending = pending & ~(there <= whole + SUFFICIENT * reached + ROUNDING * whole.abs())
            if not pending.any():
                return length
            # The lowest point of the parabola through both values and the slope.
            shorter = (reached / (2 * (whole + reached - there))).nan_to_num(nan=0.5).clamp(0.1, 0.5)
            length = torch.where(pending, length * shorter, length)
        return torch.where(pending, 0.0, length)
