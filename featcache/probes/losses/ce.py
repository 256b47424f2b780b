"""Softmax cross-entropy."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.losses.curvature import Curvature
from featcache.probes.losses.loss import Loss, LossFunction, classes_first, occurrences, usable
from featcache.probes.part import Share

# Stands for minus infinity where a class is ignored. It is finite, so that 0 times it is 0.
IGNORED = -1e30


class Ce(Loss):
    """Softmax cross-entropy, torch's with label_smoothing and class weights w: -sum w_c t_c log(p_c) over classes.

    The mean is over images. A multi-label image spreads its target evenly over the classes present (Mahajan et al.,
    ECCV 2018). Ignored classes leave the softmax and get no smoothing. An image without a class has loss 0 and counts.
    """

    type: Literal["ce"] = "ce"
    label_smoothing: Share = Field(0.0, description="share of the target that is spread over all classes")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weighs each class by N / (C n_c), as scikit-learn's"
    )

    capturable: ClassVar[bool] = True
    aliases: ClassVar[tuple[str, ...]] = ("cross_entropy", "crossentropy", "crossentropyloss", "softmax")
    link: ClassVar[Literal["sigmoid", "softmax"]] = "softmax"
    convex: ClassVar[bool] = True

    def weigh_classes(self, labels: Tensor, classes: int) -> Tensor | None:
        """See Loss.weigh_classes: N / (C n_c), scikit-learn's `balanced`, with n_c the images of class c among N.

        In multi-label data n_c counts labels of class c, and N all labels. A class without images gets 1.
        """
        if self.class_weights == "none":
            return None
        counts = occurrences(labels, classes)
        return usable(counts.sum() / (classes * counts))

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return what _single() or _several() needs besides the logits."""
        if labels.ndim == 1:
            return self._single_targets(labels, logits, weights)
        return self._targets(labels, logits, weights)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        return _single(logits, *targets) if len(targets) == 4 else _several(logits, *targets)

    def count(self, labels: Tensor, classes: int, weights: Tensor | None) -> float:
        """See Loss.count: images, each by the weight of its class."""
        return float(weights[labels].sum()) if weights is not None and labels.ndim == 1 else len(labels)

    def _targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return targets over the count of images [B, 1, C], their sums [B, 1, 1], and ignored ones [B, 1, C] or None."""
        positive = (labels > 0).to(logits.dtype)
        targets = positive / positive.sum(1, keepdim=True).clamp(min=1)  # [B, C]
        mass = positive.amax(1, keepdim=True)  # [B, 1]
        if self.label_smoothing:
            known = (labels >= 0).to(logits.dtype)
            spread = mass * known / known.sum(1, keepdim=True).clamp(min=1)
            targets = (1 - self.label_smoothing) * targets + self.label_smoothing * spread
        if weights is not None:
            targets = targets * weights.to(logits)
            mass = targets.sum(1, keepdim=True)
        ignored = None
        # Not looked up on a GPU, because the CPU would have to wait for the answer.
        if labels.device.type != "cpu" or (labels < 0).any():
            ignored = classes_first(labels < 0)
        count = len(labels)
        return classes_first(targets / count), (mass / count).unsqueeze(2), ignored

    def _single_targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return the targets without a matrix: labels [1, 1, B], the target of each image's class [1, 1, B], what
        label_smoothing adds to the target of every class, [1, C, 1] or None, and the sums of targets [1, 1, B].

        Targets are divided by the count of images, each counted by the weight of its class.
        """
        smoothing, classes = self.label_smoothing, logits.shape[2]
        by_class = logits.new_ones(classes) if weights is None else weights.to(logits)
        chosen = by_class[labels]
        count = chosen.sum()
        target, spread = (1 - smoothing) * chosen / count, smoothing * by_class / classes / count
        return (
            labels.view(1, 1, -1),
            target.view(1, 1, -1),
            spread.view(1, -1, 1) if smoothing else None,
            target + spread.sum(),
        )

    def curvature(self, function: LossFunction, labels: Tensor) -> Curvature:
        """See Loss.curvature."""
        return CeCurvature.of(function, labels)


def _several(logits: Tensor, targets: Tensor, mass: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    if ignored is not None:
        logits = logits.masked_fill(ignored, IGNORED)
    # In the memory order of the logits, because the softmax would copy them otherwise.
    logs = logits.permute(1, 2, 0).log_softmax(dim=1).permute(2, 0, 1)
    loss = -(targets * logs).sum((0, 2))
    return loss, logs.exp_().mul_(mass).sub_(targets)


def _single(
    logits: Tensor, labels: Tensor, target: Tensor, spread: Tensor | None, mass: Tensor
) -> tuple[Tensor, Tensor]:
    logs = logits.permute(1, 2, 0).log_softmax(dim=1)  # [P, C, B], the memory order of the logits.
    labels, target = labels.expand(len(logs), 1, -1), target.expand(len(logs), 1, -1)
    loss = -(logs.gather(1, labels) * target).sum((1, 2))
    if spread is not None:
        loss -= (logs * spread).sum((1, 2))
    gradient = logs.exp_().mul_(mass)
    if spread is not None:
        gradient.sub_(spread)
    return loss, gradient.scatter_add_(1, labels, -target).permute(2, 0, 1)


class CeCurvature(Curvature):
    """Softmax cross-entropy with its full curvature, across classes.

    Where an image is classified with near certainty, what is left of its loss, slope and curvature is the small
    probability of the other classes. All three are computed from that, and never as a difference from 1, which would
    leave only rounding errors at weak decays.

    targets: [Q, C, N]. mass: their sums over classes, [Q, 1, N]. ignored: bool [Q, C, N], or None. Q may be 1 for any
    number of problems that differ in their decay alone.
    """

    convex = True

    def __init__(self, targets: Tensor, mass: Tensor, ignored: Tensor | None):
        self.targets, self.mass, self.ignored = targets, mass, ignored
        self.problems, self.columns = targets.shape[:2]
        # The class that is most probable near the optimum, [Q, 1, N].
        self.likely = targets.argmax(1, keepdim=True)

    @classmethod
    def of(cls, function: LossFunction, labels: Tensor) -> Self:
        """Return the problem of a loss on labels, int8 [N, C] or int64 [N]."""
        parts = function.targets(labels, torch.float64)
        if labels.ndim == 2:
            targets, mass, ignored = parts
            ignored = None if ignored is None else ignored.permute(1, 2, 0)
            return cls(targets.permute(1, 2, 0), mass.permute(1, 2, 0), ignored)
        _, target, spread, mass = parts
        targets = target.new_zeros(1, function.classes, len(labels))
        if spread is not None:
            targets.add_(spread.view(1, -1, 1))
        return cls(targets.scatter_add_(1, labels.view(1, 1, -1), target.view(1, 1, -1)), mass.view(1, 1, -1), None)

    def take(self, numbers: Tensor) -> Self:
        """See Curvature.take."""
        if self.problems == 1:
            return self
        ignored = None if self.ignored is None else self.ignored[numbers]
        return type(self)(self.targets[numbers], self.mass[numbers], ignored)

    def among(self, rows: Tensor, count: int) -> Self:
        """See Curvature.among."""

        def spread(part: Tensor) -> Tensor:
            return part.new_zeros(*part.shape[:2], count).index_copy_(2, rows, part)

        ignored = None if self.ignored is None else spread(self.ignored)
        return type(self)(spread(self.targets), spread(self.mass), ignored)

    @classmethod
    def joined(cls, curvatures: Sequence[Self]) -> Self:
        """See Curvature.joined."""
        ignored = None
        if any(one.ignored is not None for one in curvatures):
            ignored = torch.cat(
                [
                    torch.zeros_like(one.targets, dtype=torch.bool) if one.ignored is None else one.ignored
                    for one in curvatures
                ]
            )
        return cls(torch.cat([one.targets for one in curvatures]), torch.cat([one.mass for one in curvatures]), ignored)

    def _others(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what logits miss to the largest of their image, [Q, C, N], and which class that is, [Q, 1, N].

        Also exp(minus that) of all other classes, [Q, C, N].
        """
        logits = logits if self.ignored is None else logits.masked_fill(self.ignored, IGNORED)
        largest, place = logits.max(1, keepdim=True)
        missing = largest - logits
        return missing, place, torch.exp(-missing).scatter_(1, place, 0.0)

    def value(self, logits: Tensor) -> Tensor:
        """See Curvature.value. No term is negative."""
        missing, _, others = self._others(logits)
        return missing.mul_(self.targets).sum((1, 2)) + others.sum(1, keepdim=True).log1p_().mul_(self.mass).sum((1, 2))

    def slope(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See Curvature.slope. The curvature is given by the probabilities."""
        _, place, p = self._others(logits)
        rest = p.sum(1, keepdim=True)
        p.div_(1 + rest)
        slope = (self.mass * p).sub_(self.targets)
        of_largest = self.mass - self.targets.expand_as(p).gather(1, place) - self.mass * (rest / (1 + rest))
        return slope.scatter_(1, place, of_largest), p.scatter_(1, place, 1 / (1 + rest))

    def bend(self, curvature: Tensor, move: Tensor) -> Tensor:
        """See Curvature.bend. curvature: the probabilities. A softmax sees only how the other classes move from one."""
        likely = self.likely.expand(len(move), -1, -1)
        pushed = move.sub_(move.gather(1, likely)).mul_(curvature)
        return pushed.addcmul_(curvature, pushed.sum(1, keepdim=True), value=-1).mul_(self.mass.to(curvature))

    def diagonal(self, curvature: Tensor) -> Tensor:
        """See Curvature.diagonal. curvature: the probabilities."""
        return (1 - curvature).mul_(curvature).mul_(self.mass)

    def free(self, step: Tensor) -> Tensor:
        """See Curvature.free. A softmax does not see what all classes share, and weight decay drives that to zero."""
        return step - step.mean(1, keepdim=True)
