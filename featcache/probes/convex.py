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

import torch
from torch.nn import functional as F

from featcache.probes.losses import IGNORED, LossFunction

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


def fit_convex(specs, features, labels, classes):
    """Train linear probes that share features and head; their losses, decays and iterations may differ.

    features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N], same device. Returns (weights, losses, short):
    for each spec {name: float32 CPU tensor}, the mean losses before and after each of the last Newton steps, those at its
    own decay, and whether it ended before it converged. If the features are not all finite, the weights are NaN. Seeds
    do not matter: all start from zero.
    """
    basis = Eigenbasis(features, specs[0].head.bias)
    ways, found = {}, {}
    asked = [(spec.loss, spec.optimizer.weight_decay, spec.optimizer.iterations) for spec in specs]
    for loss, decay, iterations in dict.fromkeys(asked):
        if loss not in ways:
            ways[loss] = _Way(basis, _problem(loss, labels, classes), classes, specs[0].head)
        found[loss, decay, iterations] = ways[loss].fit(decay, iterations)
    weights, losses, short = zip(*(found[one] for one in asked), strict=True)
    return [{name: w.clone() for name, w in named.items()} for named in weights], list(losses), list(short)


class Eigenbasis:
    """Images along the eigenvectors of the covariance of their features, [N, K], with a 1 for the bias behind.

    N images span a space of N directions, which the weights never leave, so that K = min(N, D), and one more with a
    bias. spread: the mean square along each direction, float64 [K]. finite: whether all features are.
    """

    def __init__(self, features, bias):
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

    def _kept(self, turn, corner):
        """The images in the basis, {dtype: [N, K without bias]}, or None if they are too large."""
        if corner is not None:
            rows = corner.t() @ turn
        elif self.features.numel() * (8 + 4) <= KEPT_BYTES:
            rows = torch.cat([(rows.double() - self.mean) @ turn for rows in self.features.split(CHUNK_ROWS)])
        else:
            return None
        return {rows.dtype: rows, torch.float32: rows.float()}

    def along(self, points):
        """Products of all images with points [K, M], in their dtype: [N, M]."""
        if self._rows:
            weight = points[: len(self.directions.t())]
            rows = self._rows[points.dtype]
            return torch.addmm(points[-1:], rows, weight) if self.bias else rows @ weight
        weight, bias = self.as_weights(points)
        return torch.cat([rows.to(weight) @ weight for rows in self.features.split(CHUNK_ROWS)]).add_(bias)

    def pulled(self, pushes):
        """Products of all directions with what pulls at each image, [N, M], in its dtype: [K, M]."""
        if self._rows:
            weight = self._rows[pushes.dtype].t() @ pushes
        else:
            weight = torch.zeros(len(self.directions), pushes.shape[1]).to(pushes)
            for rows, push in zip(self.features.split(CHUNK_ROWS), pushes.split(CHUNK_ROWS), strict=True):
                weight.addmm_(rows.to(push).t(), push)
            weight = self.directions.to(pushes).t() @ (weight - self.mean.to(pushes).unsqueeze(1) * pushes.sum(0))
        return torch.cat([weight, pushes.sum(0, keepdim=True)]) if self.bias else weight

    def as_weights(self, points):
        """Points [K, M] as weights [D, M] of the features themselves, and biases [M]."""
        weight = self.directions.to(points) @ points[: self.directions.shape[1]]
        shift = self.mean.to(points) @ weight
        return weight, points[-1] - shift if self.bias else -shift


class _Way:
    """The optima of one loss, from strong to weak decay."""

    def __init__(self, basis, problem, classes, head):
        self.basis, self.problem, self.head, self.stations = basis, problem, head, {}
        self.start = basis.spread.new_zeros(len(basis.spread), classes)
        push, curvature = problem.slope(self._logits(self.start))
        slope = self._pulled(push)
        self.steep = problem.dot(slope, slope).sqrt()
        strongest = basis.spread[: basis.directions.shape[1]].max() * problem.flat(curvature).max()
        self.first = math.floor(math.log10(strongest)) if 0 < strongest < math.inf else 0

    def fit(self, decay, iterations):
        """Weights, mean losses and whether it fell short, of one probe."""
        if not self.basis.finite:
            point, losses, short = torch.full_like(self.start, torch.nan), [math.nan], False
        else:
            point, losses, short = self._minimise(self._station(decay), decay, iterations)
        weight, bias = self.basis.as_weights(point)
        named = {"fc0.weight": weight.t().contiguous()} | ({"fc0.bias": bias} if self.basis.bias else {})
        return {name: w.float().cpu() for name, w in named.items()}, losses, short

    def _station(self, decay):
        """The point from which to seek the optimum of a decay: about that of the next higher power of ten."""
        point = self.start
        for power in range(self.first, self.first - POWERS, -1):
            if 10.0**power <= decay:
                break
            if power not in self.stations:
                self.stations[power] = self._minimise(point, 10.0**power, ROUGH_STEPS, ROUGHLY)[0]
            point = self.stations[power]
        return point

    def _logits(self, point):
        return self.basis.along(point).div_(self.head.temperature).add_(self.head.offset)

    def _pulled(self, push):
        return self.basis.pulled(push).div_(self.head.temperature)

    def _minimise(self, point, decay, steps, share=0.0):
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
        return point, losses, bool(pending.any())

    @staticmethod
    def _gained(norm, whole, lowest, pending):
        """Whether any pending problem has a smaller gradient, or a lower objective, than it ever had."""
        better = (norm < 0.9 * lowest[0]) | (whole < lowest[1] - 10 * ROUNDING * lowest[1].abs())
        return bool((better & pending).any())

    def _newton(self, slope, curvature, penalty, pending):
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

    def _length(self, logits, move, line, start, pending):
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


def _problem(loss, labels, classes):
    """A loss as a function of the logits of all images, with its curvature."""
    function = LossFunction(loss, labels, classes)
    return {"bce": _Bce, "ce": _Ce}.get(loss.type, _Joint)(function, labels)


class _Joint:
    """Any loss, a problem of all classes. Of its curvature only what bends up is used, class by class.

    What bends down would make the objective fall without end in the eyes of conjugate gradients.
    """

    # For differences of gradients, in logits.
    WIDTH = 1e-4

    def __init__(self, function, labels):
        self.function, self.labels = function, labels

    def _look(self, logits):
        value, push = self.function(logits.unsqueeze(1), self.labels)
        return value, push[:, 0]

    def dot(self, left, right):
        """Products of [K, C], one for each problem: [1]."""
        return (left * right).sum().expand(1)

    def value(self, logits):
        """Losses of the problems at logits [N, C]."""
        return self._look(logits)[0]

    def slope(self, logits):
        """Gradient by the logits, [N, C], and the curvature, which `bend` and `flat` understand."""
        above, below = (self._look(logits + by)[1] for by in (self.WIDTH, -self.WIDTH))
        return self._look(logits)[1], ((above - below) / (2 * self.WIDTH)).clamp_(min=0)

    def bend(self, curvature, move):
        """The curvature times a move of the logits, both [N, C]."""
        return curvature * move

    def flat(self, curvature):
        """The curvature of each class, summed over images, [C]."""
        return curvature.sum(0)

    def free(self, step):
        """What of a step, [K, C], leads anywhere."""
        return step


class _Bce(_Joint):
    """A sum over classes, each of which is a problem of its own. Values are [C]."""

    def __init__(self, function, labels):
        targets, known, weights = function.targets(labels, torch.float64)
        factor = 1 if weights is None else 1 + (weights - 1) * targets
        # a log(1 + exp(-z)) + b z
        self.curved, self.straight = (factor * known).expand_as(targets)[:, 0], ((1 - targets) * known)[:, 0]

    def dot(self, left, right):
        return (left * right).sum(0)

    def value(self, logits):
        return F.softplus(-logits).mul_(self.curved).addcmul_(self.straight, logits).sum(0)

    def slope(self, logits):
        absent = (-logits).sigmoid_()
        pushed = self.curved * absent
        return self.straight - pushed, pushed.mul_(1 - absent)


class _Ce(_Joint):
    """Softmax, with its whole curvature."""

    def __init__(self, function, labels):
        parts = function.targets(labels, torch.float64)
        if len(parts) == 3:
            # Multi-label: targets, their sums, and what is ignored.
            self.targets, self.mass, ignored = parts
            self.targets, self.mass = self.targets[:, 0], self.mass[:, 0]
            self.ignored = None if ignored is None else ignored[:, 0]
            return
        _, own, even, mass = parts
        self.targets = own.new_zeros(len(labels), function.classes)
        self.targets.add_(0 if even is None else even.view(-1)).scatter_add_(1, labels.view(-1, 1), own.view(-1, 1))
        self.mass, self.ignored = mass.view(-1, 1), None

    def _logs(self, logits):
        return (logits if self.ignored is None else logits.masked_fill(self.ignored, IGNORED)).log_softmax(1)

    def value(self, logits):
        return self._logs(logits).mul_(self.targets).sum().neg().expand(1)

    def slope(self, logits):
        p = self._logs(logits).exp_()
        return (self.mass * p).sub_(self.targets), p

    def bend(self, p, move):
        pushed = p * move
        return pushed.addcmul_(p, pushed.sum(1, keepdim=True), value=-1).mul_(self.mass.to(p))

    def flat(self, p):
        return (self.mass * p * (1 - p)).sum(0)

    def free(self, step):
        # What all classes share a softmax does not see, and the decay drives to zero, where it began.
        return step - step.mean(1, keepdim=True)
