"""Newton's method for many convex problems side by side, in an eigenbasis that they all share.

A problem minimises its loss, summed over images, plus decay / 2 |W|^2, without a free bias, in float64.

The Hessian is X'DX + decay, with D the curvature of the loss at each image. It is close to mean(D) X'X + decay, which is
diagonal in the eigenbasis of X'X, whatever the class, the loss, the images left out and the decay. With that as
preconditioner, better still where a few images bend the loss most (see preconditioner.py), a few products by conjugate
gradients give a Newton step (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1). The products are in float32,
objectives and gradients in float64. A problem that is done leaves the products.

A problem has converged once the norm of its gradient is at most 1e-5 decay |W|. The decay makes the objective so steep
that at a distance |W - W*| from the optimum the norm is at least decay |W - W*|. So the distance is then at most 1e-5
|W|, whatever the decay and the scale of the features.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from featcache.probes.losses.curvature import Curvature
from featcache.probes.solvers.convex.basis import Eigenbasis
from featcache.probes.solvers.convex.preconditioner import Preconditioner, Work

# Convergence: the norm of the gradient over decay |W|.
TOLERANCE = 1e-5
# Convergence without decay, where weights may grow for ever: the norm over that of the gradient at the start.
UNDECAYED_TOLERANCE = 1e-7
# Gradients below this share of the one at the start are rounding errors of float64.
RESOLUTION = 1e-16
# Conjugate gradients end once the residual is this share of the gradient, or after so many products. Where a step had to
# be cut short, the share of the next one is a tenth of that, down to the least: a hinge asks for exact steps.
INEXACT, LEAST_INEXACT, PRODUCTS = 0.1, 1e-4, 500
# They go on without those that are done once these are so large a share.
DONE = 0.25
# A step is taken if the objective falls by this share of what its slope promises (Armijo), up to rounding.
SUFFICIENT, ROUNDING, TRIALS = 1e-4, 1e-13, 40
# After so many steps without progress, float64 is at its limit.
PATIENCE = 5


@dataclass(frozen=True)
class Optima:
    """Where the search for the optima of Q problems ended.

    points: float64 [Q, R, K], in the eigenbasis. losses: without the decay, before and after each step, as they were
    when a problem ended: [T, Q]. objectives: with the decay. sizes: |W|. away: a bound on |W - W*|, infinite without decay.
    gradient: its norm over the largest that converges. steps: Newton steps. All [Q].
    """

    points: Tensor
    losses: Tensor
    objectives: Tensor
    sizes: Tensor
    away: Tensor
    gradient: Tensor
    steps: Tensor

    @property
    def distance(self) -> Tensor:
        """A bound on |W - W*| / |W|, [Q]."""
        return ratio(self.away, self.sizes)


class _Search(NamedTuple):
    """The problems that are not done yet, and where they are. numbers: among all. All others as in minimise."""

    numbers: Tensor
    points: Tensor
    logits: Tensor
    penalty: Tensor
    value: Tensor
    least: Tensor
    steps: Tensor
    lowest_norm: Tensor
    lowest: Tensor
    stale: Tensor
    inexact: Tensor

    def keep(self, kept: Tensor) -> "_Search":
        """Return the problems of a mask, bool [Q]."""
        return _Search(*(field[kept] for field in self))

    def after(self, norm: Tensor, objective: Tensor) -> "_Search":
        """Return the search after a look at the norms of its gradients and its objectives, both [Q]."""
        better = (norm < 0.9 * self.lowest_norm) | (objective < self.lowest - 10 * ROUNDING * self.lowest.abs())
        return self._replace(
            stale=torch.where(better, 0, self.stale + 1),
            lowest_norm=torch.minimum(norm, self.lowest_norm),
            lowest=torch.minimum(objective, self.lowest),
        )

    def moved(self, length: Tensor, step: Tensor, move: Tensor, value: Tensor) -> "_Search":
        """Return the search after steps, of which each problem takes a length [Q]. move: of the logits."""
        inexact = torch.where(length < 1, self.inexact / 10, self.inexact).clamp(min=LEAST_INEXACT)
        length = length.view(-1, 1, 1)
        return self._replace(
            points=self.points + length * step,
            logits=self.logits.add_(length * move),
            value=value,
            inexact=inexact,
        )


def minimise(
    basis: Eigenbasis,
    loss: Curvature,
    start: Tensor,
    decay: Tensor,
    steep: Tensor,
    steps: Tensor,
    work: Work,
    *,
    share: float = 0.0,
    tolerance: float = TOLERANCE,
    shift: float = 0.0,
) -> Optima:
    """Take Newton steps until the gradient of each problem is small, or that share of its first one.

    loss: Q problems. start: points, float64 [Q, R, K]. decay: [Q]. steep: norms of the gradients at zero, [Q]. steps:
    most Newton steps of each, int64 [Q]. work: that of the path so far. shift: what is added to all logits.
    """
    count = len(start)
    logits = basis.along(start) + shift
    least = steep * torch.where(decay > 0, RESOLUTION, UNDECAYED_TOLERANCE)
    endless = torch.full_like(decay, torch.inf)
    now = _Search(torch.arange(count, device=start.device), start, logits, basis.penalty(decay), loss.value(logits), least,
                  steps, endless, endless, torch.zeros_like(steps), torch.full_like(decay, INEXACT))  # fmt: skip
    objectives, sizes, away, gradient = (torch.empty_like(decay) for _ in range(4))
    # Filled in where problems end.
    ends = Optima(torch.empty_like(start), now.value, objectives, sizes, away, gradient, torch.empty_like(steps))
    values, losses = now.value.clone(), []
    for taken in range(int(steps.max()) + 1):
        values[now.numbers] = now.value
        losses.append(values.clone())
        push, curvature = loss.slope(now.logits)
        decayed = now.penalty * now.points
        slope = basis.pulled(push).add_(decayed)
        norm, objective = basis.slant(slope), now.value + _dot(decayed, now.points) / 2
        if taken == 0:
            now = now._replace(least=torch.maximum(now.least, share * norm))
        enough = torch.maximum(tolerance * decayed.flatten(1).norm(dim=1), now.least)
        now = now.after(norm, objective)
        going = (norm > enough) & (now.stale < PATIENCE) & (taken < now.steps)
        if not going.all():
            over = ~going
            ended = now.numbers[over]
            ends.points[ended], ends.objectives[ended], ends.steps[ended] = now.points[over], objective[over], taken
            ends.sizes[ended] = (now.points * (now.penalty > 0)).flatten(1).norm(dim=1)[over]
            ends.away[ended], ends.gradient[ended] = ratio(norm[over], decay[ended]), ratio(norm[over], enough[over])
            if not going.any():
                break
            now, loss = now.keep(going), loss.take(going.nonzero()[:, 0])
            slope, curvature, objective = slope[going], curvature[going], objective[going]
        step = _newton(basis, loss, slope, curvature, now.penalty, now.inexact, work)
        move = basis.along(step)
        length, value = _length(loss, now, step, move, objective, _dot(slope, step))
        now = now.moved(length, step, move, value)
    return replace(ends, losses=torch.stack(losses))


def ratio(missing: Tensor, size: Tensor) -> Tensor:
    """Return what is missing over a size, which is 0 where nothing is missing, even from 0."""
    return torch.where(missing == 0, 0.0, missing / size)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of two [Q, R, K] for each problem: [Q]."""
    return (left * right).flatten(1).sum(1)


def _newton(
    basis: Eigenbasis, loss: Curvature, slope: Tensor, curvature: Tensor, penalty: Tensor, inexact: Tensor, work: Work
) -> Tensor:
    """Return roughly minus the inverse Hessian times the gradient, [Q, R, K]. inexact: up to which residual, [Q]."""
    # Near the optimum a gradient may be too small for float32.
    scale = slope.abs().amax((1, 2), keepdim=True)
    residual = (slope / -scale).float()
    exact = work.exact(len(basis.features), slope.shape[0] * slope.shape[1], slope.shape[2], slope.device)
    inverse = Preconditioner.of(basis, loss, curvature, penalty, exact)
    curvature, penalty = curvature.float(), penalty.float()
    step = torch.zeros_like(residual)
    found, numbers = torch.empty_like(residual), torch.arange(len(residual), device=residual.device)
    preconditioned = loss.free(inverse(residual))
    direction, product = preconditioned, _dot(residual, preconditioned)
    enough = (inexact.square() * product).float()
    pending = torch.ones_like(product, dtype=torch.bool)
    products = 0
    for _ in range(PRODUCTS):
        products += len(residual)
        bent = basis.pulled(loss.bend(curvature, basis.along(direction))).addcmul_(penalty, direction)
        length = _dot(direction, bent)
        pending = pending & (length > 0)
        length = torch.where(pending, product / length, 0.0).view(-1, 1, 1)
        step.addcmul_(length, direction)
        residual.addcmul_(length, bent, value=-1)
        preconditioned = loss.free(inverse(residual))
        before, product = product, _dot(residual, preconditioned)
        pending = pending & (product > enough)
        going = int(pending.sum())
        if not going:
            break
        direction = preconditioned.addcmul(torch.where(pending, product / before, 0.0).view(-1, 1, 1), direction)
        if going <= (1 - DONE) * len(pending):
            found[numbers[~pending]] = step[~pending]
            numbers, loss = numbers[pending], loss.take(pending.nonzero()[:, 0])
            step, residual, direction = (t[pending] for t in (step, residual, direction))
            inverse = inverse.take(pending)
            curvature, penalty, product, enough = (t[pending] for t in (curvature, penalty, product, enough))
            pending = pending[pending]
    found[numbers] = step
    work.note(products / len(slope), inverse.exact)
    return found.double().mul_(scale)


def _length(
    loss: Curvature, now: _Search, step: Tensor, move: Tensor, objective: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how much of a step each problem takes, and its loss there, both [Q].

    It takes all of the step, or less and less until the objective falls. slope: of the objective along the step.
    """
    pulling, bending = _dot(now.penalty * now.points, step), _dot(now.penalty * step, step)
    decay_part = objective - now.value
    length, pending = torch.ones_like(slope), torch.ones_like(slope, dtype=torch.bool)
    for _ in range(TRIALS):
        loss_there = loss.value(now.logits + length.view(-1, 1, 1) * move)
        value = loss_there + decay_part + length * (pulling + length / 2 * bending)
        promised = length * slope
        pending = pending & ~(value <= objective + SUFFICIENT * promised + ROUNDING * objective.abs())
        if not pending.any():
            return length, loss_there
        # The minimum of the parabola through both values and the slope.
        shorter = (promised / (2 * (objective + promised - value))).nan_to_num(nan=0.5).clamp(0.1, 0.5)
        length = torch.where(pending, length * shorter, length)
    return torch.where(pending, 0.0, length), torch.where(pending, now.value, loss_there)
