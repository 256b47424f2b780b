"""Full-batch L-BFGS for linear probes, many at once (Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.5).

Minimises the mean loss over all images plus weight_decay / 2 |W|^2, the bias left out, in float64. With `ce` on
single-label data that is scikit-learn's LogisticRegression with C = 1 / (N weight_decay).

A probe has converged once the norm of its gradient is at most 1e-5 weight_decay |W|. At a distance |W - W*| from the
optimum that norm is at least weight_decay |W - W*|, so steep does the decay make the objective: the distance is then at
most 1e-5 |W|, whatever the decay and the scale of the features.
"""

import torch

from featcache.probes.heads.weights import stacked_weights
from featcache.probes.losses import LossFunction

HISTORY = 10
# Converged: the largest gradient over weight_decay |W|.
TOLERANCE = 1e-5
# Without decay there may be no optimum, but weights that grow for ever: over the gradient at the start.
UNDECAYED_TOLERANCE = 1e-7
# Less of the gradient at the start is the rounding of float64.
RESOLUTION = 1e-14
# A step is taken if the objective falls by this share of what its slope promises (Armijo), but for rounding.
SUFFICIENT = 1e-4
ROUNDING = 1e-15
TRIALS = 40
CHUNK_ROWS = 4096


def fit_lbfgs(specs, features, labels, classes):
    """Train linear probes that share features; their losses, decays and iterations may differ.

    features: [N, D], any float dtype. labels: int8 [N, C] or int64 [N], same device. Returns (weights, losses, short):
    for each spec {name: float32 CPU tensor}, the mean losses at the start and after every iteration, and whether it
    ended before it converged. A probe whose objective is not finite has weights that are NaN. The order of images and
    the neighbours only change how rounding falls, and so where within its tolerance a probe ends.
    """
    problem = _Problem(specs, features, labels, classes)
    start = stacked_weights(specs, features.shape[1], classes, features.device)
    # From zero: seeds do not matter then, not even to what a softmax leaves open.
    point = torch.cat([torch.zeros_like(w).double().flatten(1) for w in start.values()], dim=1)  # [P, C D + C]
    limits = torch.tensor([s.optimizer.iterations for s in specs], device=point.device)
    value, slope, loss = problem.evaluate(point, torch.arange(len(specs), device=point.device))
    least = slope.norm(dim=1) * torch.where(problem.decay > 0, RESOLUTION, UNDECAYED_TOLERANCE)
    losses, moved = [[number] for number in loss.tolist()], torch.ones_like(limits, dtype=torch.bool)
    pairs = []
    for iteration in range(int(limits.max())):
        active = moved & (iteration < limits) & problem.unfinished(point, value, slope, least)
        if not active.any():
            break
        before = point.clone(), slope.clone()
        direction = _direction(slope, pairs, problem.flatness)
        moved = _line_search(problem, (point, value, slope, loss), direction, active)
        pairs = [*pairs[1 - HISTORY :], _pair(point - before[0], slope - before[1])]
        for p in moved.nonzero().flatten().tolist():
            losses[p].append(loss[p].item())
    short = problem.unfinished(point, value, slope, least).tolist()
    point[~torch.isfinite(value)] = torch.nan
    parts = point.split([w[0].numel() for w in start.values()], dim=1)
    fitted = {n: part.reshape(w.shape).float().cpu() for (n, w), part in zip(start.items(), parts, strict=True)}
    return [{n: w[p].clone() for n, w in fitted.items()} for p in range(len(specs))], losses, short


class _Problem:
    """The objectives of the probes, with their gradients."""

    def __init__(self, specs, features, labels, classes):
        self.features, self.labels, self.head = features, labels, specs[0].head
        self.shape = (classes, features.shape[1])
        self.losses = [spec.loss for spec in specs]
        self.functions = {loss: LossFunction(loss, labels, classes) for loss in set(self.losses)}
        self.totals = {loss: max(f.count(labels), 1) for loss, f in self.functions.items()}
        self.decay = torch.tensor([s.optimizer.weight_decay for s in specs], device=features.device).double()
        self.flatness = self._flatness()

    def _flatness(self):
        """One over the curvature along each weight, [P, n], about: that of the mean over classes of bce at zero.

        With it the features may lie on other scales than one another and than the bias.
        """
        classes, dim = self.shape
        squares = sum(rows.double().square().sum(0) for rows in self.features.split(CHUNK_ROWS)) / len(self.features)
        each = 1 / (4 * classes * self.head.temperature**2)
        along = (each * squares + self.decay.unsqueeze(1)).clamp(min=1e-12 * each)  # [P, D]
        weight = (1 / along).unsqueeze(1).expand(-1, classes, dim).flatten(1)
        return torch.cat([weight, weight.new_full((len(weight), classes * self.head.bias), 1 / each)], dim=1)

    def unfinished(self, points, values, slopes, least):
        """Which of all probes have an objective, and a gradient beyond their tolerance: bool [P]. least: of those."""
        weights = points[:, : self.shape[0] * self.shape[1]]
        tolerance = torch.maximum(TOLERANCE * self.decay * weights.norm(dim=1), least)
        return torch.isfinite(values) & (slopes.norm(dim=1) > tolerance)

    def evaluate(self, points, probes):
        """At points [k, n] of the probes [k]: objectives [k], gradients [k, n] and mean losses [k]."""
        size = self.shape[0] * self.shape[1]
        weight, bias = points[:, :size].unflatten(1, self.shape), points[:, size:]
        loss, slope = torch.zeros(len(points)).to(points), torch.zeros_like(points)
        chosen = [self.losses[p] for p in probes.tolist()]
        for rows, labels in zip(self.features.split(CHUNK_ROWS), self.labels.split(CHUNK_ROWS), strict=True):
            rows = rows.double()
            logits = (weight.flatten(0, 1) @ rows.t()).unflatten(0, weight.shape[:2])  # [k, C, B]
            if self.head.bias:
                logits += bias.unsqueeze(2)
            logits = (logits / self.head.temperature + self.head.offset).permute(2, 0, 1)
            gradient = torch.empty_like(logits)
            for kind in set(chosen):
                own = [k for k, other in enumerate(chosen) if other == kind]
                share = self.functions[kind].count(labels) / self.totals[kind]
                part, push = self.functions[kind](logits[:, own], labels)
                loss[own] += part * share
                gradient[:, own] = push * (share / self.head.temperature)
            gradient = gradient.permute(1, 2, 0)
            slope[:, :size] += (gradient.flatten(0, 1) @ rows).view(len(points), -1)
            if self.head.bias:
                slope[:, size:] += gradient.sum(2)
        decay = self.decay[probes]
        slope[:, :size] += decay.unsqueeze(1) * points[:, :size]
        return loss + decay / 2 * points[:, :size].square().sum(1), slope, loss


def _pair(step, change):
    """A step, the change of the gradient along it, and one over their product: 0 where the pair is of no use."""
    product = (step * change).sum(1, keepdim=True)
    useful = product > 1e-10 * change.square().sum(1, keepdim=True)
    return step, change, torch.where(useful, 1 / product, 0.0)


def _direction(slope, pairs, flatness):
    """Minus the inverse Hessian times the gradient [P, n]: what is known of it beforehand, as the pairs correct it."""
    result, scale, kept = -slope, torch.ones_like(slope[:, :1]), []
    for step, change, inverse in reversed(pairs):
        kept.append(inverse * (step * result).sum(1, keepdim=True))
        result = result - kept[-1] * change
    for _, change, inverse in pairs:
        # In the end that of the latest useful pair.
        known = (change.square() * flatness).sum(1, keepdim=True)
        scale = torch.where(inverse > 0, 1 / (inverse * known), scale)
    result = result * flatness * scale
    for (step, change, inverse), share in zip(pairs, reversed(kept), strict=True):
        result = result + step * (share - inverse * (change * result).sum(1, keepdim=True))
    return result


def _line_search(problem, state, direction, active):
    """Step along the directions, halving or better until the objective has fallen enough.

    state: point, value, slope and loss, changed in place where a step was taken. Returns where, bool [P].
    """
    point, value, slope, loss = state
    promise = (direction * slope).sum(1)
    length = torch.ones_like(value)
    pending, moved = active.nonzero().flatten(), torch.zeros_like(active)
    for _ in range(TRIALS):
        if not len(pending):
            break
        tried = point[pending] + length[pending, None] * direction[pending]
        there, *rest = problem.evaluate(tried, pending)
        reached, slack = length[pending] * promise[pending], ROUNDING * value[pending].abs()
        good = there <= value[pending] + SUFFICIENT * reached + slack
        # The lowest point of the parabola through both values and the slope, between a tenth and a half of the step.
        shorter = -reached / (2 * (there - value[pending] - reached))
        length[pending] *= shorter.nan_to_num(nan=0.5).clamp(0.1, 0.5)
        taken = pending[good]
        moved[taken] = True
        for held, new in zip(state, (tried, there, *rest), strict=True):
            held[taken] = new[good]
        pending = pending[~good]
    return moved
