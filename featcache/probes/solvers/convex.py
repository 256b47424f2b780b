"""Full-batch training of linear probes by Newton's method, in an eigenbasis that they all share.

It minimises the mean loss over all images plus weight_decay / 2 |W|^2, without the bias, in float64. With `ce` on
single-label data this is scikit-learn's LogisticRegression with C = 1 / (N weight_decay).

The Hessian is X'DX + decay, with D the curvature of the loss at each image. It is close to mean(D) X'X + decay, which is
diagonal in the eigenbasis of X'X, whatever the class, the loss and the decay. With that as preconditioner, a few
products by conjugate gradients give a Newton step (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1). The
products are in float32, objectives and gradients in float64.

The weaker the decay, the harder the problem. The search for an optimum therefore starts from that of a stronger decay,
and goes down the powers of ten. Probes share these stations, but a probe's result does not depend on the others.

A problem has converged once the norm of its gradient is at most 1e-5 weight_decay |W|. The decay makes the
objective so steep that at a distance |W - W*| from the optimum the norm is at least weight_decay |W - W*|. So the
distance is then at most 1e-5 |W|, whatever the decay and the scale of the features.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featcache.probes.heads.linear import Linear
from featcache.probes.losses.curvature import Curvature
from featcache.probes.losses.loss import Loss, LossFunction
from featcache.probes.solvers.solver import Fit

# Convergence: the norm of the gradient over weight_decay |W|.
TOLERANCE = 1e-5
# Convergence without decay, where weights may grow for ever: the norm over that of the gradient at the start.
UNDECAYED_TOLERANCE = 1e-7
# Gradients below this share of the one at the start are rounding errors of float64.
RESOLUTION = 1e-14
# The search leaves a power of ten once the gradient is this share of its first one, or after so many steps. There are
# at most so many powers; weaker decays, and no decay, start from the last.
ROUGHLY, ROUGH_STEPS, POWERS = 0.03, 50, 10
# Conjugate gradients end once the residual is this share of the gradient, or after so many products.
INEXACT, PRODUCTS = 0.1, 500
# A step is taken if the objective falls by this share of what its slope promises (Armijo), up to rounding.
SUFFICIENT, ROUNDING, TRIALS = 1e-4, 1e-13, 40
# After so many steps without progress, float64 is at its limit.
PATIENCE = 5
CHUNK_ROWS = 4096
# Images are kept in the eigenbasis if they take no more than this; otherwise every product rotates them again.
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Problem:
    """What a linear probe minimises, loss plus decay / 2 |W|^2, and the largest number of Newton steps."""

    loss: Loss
    decay: float
    iterations: int


def fit_convex(problems: list[Problem], head: Linear, features: Tensor, labels: Tensor, classes: int) -> list[Fit]:
    """Solve problems of linear probes that share features and head, and return a Fit of each. All start from zero.

    features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N], same device. The losses of a Fit are those
    of the Newton steps at the problem's own decay.
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
    """Images along the eigenvectors of the covariance of their features, [N, K], with a column of ones for the bias.

    N images span at most N directions, and the weights stay in their span, so K = min(N, D), plus one with a bias.
    spread: the mean square along each direction, float64 [K]. finite: whether all features are finite.
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
        """Return the images in the basis, {dtype: [N, K without bias]}, or None if they are too large to keep."""
        if corner is not None:
            rows = corner.t() @ turn
        elif self.features.numel() * (8 + 4) <= KEPT_BYTES:
            rows = torch.cat([(rows.double() - self.mean) @ turn for rows in self.features.split(CHUNK_ROWS)])
        else:
            return None
        return {rows.dtype: rows, torch.float32: rows.float()}

    def along(self, points: Tensor) -> Tensor:
        """Return products of all images with points [K, M], in the dtype of the points: [N, M]."""
        if self._rows:
            weight = points[: len(self.directions.t())]
            rows = self._rows[points.dtype]
            return torch.addmm(points[-1:], rows, weight) if self.bias else rows @ weight
        weight, bias = self.as_weights(points)
        return torch.cat([rows.to(weight) @ weight for rows in self.features.split(CHUNK_ROWS)]).add_(bias)

    def pulled(self, pushes: Tensor) -> Tensor:
        """Return the transpose of along(): take gradients by the logits, [N, M], to those by the points, [K, M]."""
        if self._rows:
            weight = self._rows[pushes.dtype].t() @ pushes
        else:
            weight = torch.zeros(len(self.directions), pushes.shape[1]).to(pushes)
            for rows, push in zip(self.features.split(CHUNK_ROWS), pushes.split(CHUNK_ROWS), strict=True):
                weight.addmm_(rows.to(push).t(), push)
            weight = self.directions.to(pushes).t() @ (weight - self.mean.to(pushes).unsqueeze(1) * pushes.sum(0))
        return torch.cat([weight, pushes.sum(0, keepdim=True)]) if self.bias else weight

    def as_weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return points [K, M] as weights [D, M] of the original features, and biases [M]."""
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
        """Return where to start for a decay: roughly at the optimum of the next higher power of ten."""
        point = self.start
        for power in range(self.first, self.first - POWERS, -1):
            if 10.0**power <= decay:
                break
            if power not in self.stations:
                self.stations[power] = self._minimise(point, 10.0**power, ROUGH_STEPS, ROUGHLY)[0]
            point = self.stations[power]
        return point

    def _logits(self, point: Tensor) -> Tensor:
        return self.basis.along(point).div_(self.head.temperature).add_(self.head.shift)

    def _pulled(self, push: Tensor) -> Tensor:
        return self.basis.pulled(push).div_(self.head.temperature)

    def _minimise(
        self, point: Tensor, decay: float, steps: int, share: float = 0.0
    ) -> tuple[Tensor, list[float], bool]:
        """Take Newton steps from a point [K, C] until the gradient is small, or that share of the first one."""
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
            norm, objective = problem.dot(slope, slope).sqrt(), value + problem.dot(decayed, point) / 2
            if lowest is None:
                least, lowest = torch.maximum(least, share * norm), (norm, objective)
            weight = problem.dot(decayed, decayed).sqrt()
            pending = norm > torch.maximum(TOLERANCE * weight, least)
            stale = stale + 1 if taken and not self._gained(norm, objective, lowest, pending) else 0
            lowest = torch.minimum(norm, lowest[0]), torch.minimum(objective, lowest[1])
            if not pending.any() or taken == steps or stale == PATIENCE:
                break
            step = self._newton(slope, curvature, penalty, pending)
            move = basis.along(step).div_(self.head.temperature)
            length = self._length(logits, move, (point, step, penalty), (objective, problem.dot(slope, step)), pending)
            point, logits = point + length * step, logits.add_(length * move)
        return point, losses, not pending.any()

    @staticmethod
    def _gained(norm: Tensor, objective: Tensor, lowest: tuple[Tensor, Tensor], pending: Tensor) -> bool:
        """Return whether any pending problem has a smaller gradient, or a lower objective, than ever before."""
        better = (norm < 0.9 * lowest[0]) | (objective < lowest[1] - 10 * ROUNDING * lowest[1].abs())
        return bool((better & pending).any())

    def _newton(self, slope: Tensor, curvature: Tensor, penalty: Tensor, pending: Tensor) -> Tensor:
        """Return roughly minus the inverse Hessian times the gradient, [K, C]; 0 where a problem is not pending."""
        dot = self.problem.dot
        # Near the optimum a gradient may be too small for float32.
        scale = slope.abs().amax()
        residual, curvature = (slope / -scale).float(), curvature.float()
        hessian = self.basis.spread.unsqueeze(1) / self.head.temperature**2 * self.problem.flat(curvature).double()
        hessian = hessian + penalty.unsqueeze(1)
        inverse = (1 / hessian.clamp(min=1e-10 * float(hessian.max()))).float()
        penalty = penalty.float().unsqueeze(1)
        step, preconditioned = torch.zeros_like(residual), self.problem.free(inverse * residual)
        direction, product = preconditioned, dot(residual, preconditioned)
        enough = INEXACT**2 * product
        for _ in range(PRODUCTS):
            move = self.basis.along(direction).div_(self.head.temperature)
            bent = self._pulled(self.problem.bend(curvature, move)).addcmul_(penalty, direction)
            length = dot(direction, bent)
            pending = pending & (length > 0)
            length = torch.where(pending, product / length, 0.0)
            step, residual = step.addcmul_(length, direction), residual.addcmul_(length, bent, value=-1)
            preconditioned = self.problem.free(inverse * residual)
            before, product = product, dot(residual, preconditioned)
            pending = pending & (product > enough)
            if not pending.any():
                break
            direction = preconditioned.addcmul(torch.where(pending, product / before, 0.0), direction)
        return step.double() * scale

    def _length(
        self,
        logits: Tensor,
        move: Tensor,
        line: tuple[Tensor, Tensor, Tensor],
        start: tuple[Tensor, Tensor],
        pending: Tensor,
    ) -> Tensor:
        """Return how much of a step each problem takes: all, or less and less until the objective falls.

        line: point, step, penalty. start: the objective, and its slope along the step.
        """
        (point, step, penalty), (objective, slope), dot = line, start, self.problem.dot
        pulling, bending = (dot(penalty.unsqueeze(1) * other, step) for other in (point, step))
        decay_part = objective - self.problem.value(logits)
        length = pending.double()
        for _ in range(TRIALS):
            value = self.problem.value(logits + length * move) + decay_part + length * (pulling + length / 2 * bending)
            promised = length * slope
            pending = pending & ~(value <= objective + SUFFICIENT * promised + ROUNDING * objective.abs())
            if not pending.any():
                return length
            # The minimum of the parabola through both values and the slope.
            shorter = (promised / (2 * (objective + promised - value))).nan_to_num(nan=0.5).clamp(0.1, 0.5)
            length = torch.where(pending, length * shorter, length)
        return torch.where(pending, 0.0, length)
