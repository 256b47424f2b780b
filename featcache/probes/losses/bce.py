"""Binary cross-entropy for each class."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.losses.curvature import Curvature, LogisticCurvature
from featcache.probes.losses.loss import Loss, LossFunction, absences, occurrences, present, shares, usable
from featcache.probes.part import Share


class Bce(Loss):
    """Binary cross-entropy with logits, the mean over the classes and images that are not ignored.

    The target is t = (1 - s) max(label, off) + s / C with off_label and label_smoothing s, both as in How-to-Probe.
    Class weights, negatives over positives, multiply the positive part, t log(p), as torch's pos_weight.
    """

    type: Literal["bce"] = "bce"
    off_label: Annotated[float, Field(ge=0, le=1)] | Literal["1/C"] = Field(
        0.0, description="target of an absent class"
    )
    label_smoothing: Share = Field(0.0, description="share of the target that is spread over all classes")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weighs positives by negatives / positives of their class"
    )

    capturable: ClassVar[bool] = True
    aliases: ClassVar[tuple[str, ...]] = ("binary_cross_entropy", "bce_with_logits", "bcewithlogitsloss")
    convex: ClassVar[bool] = True

    def weigh_classes(self, labels: Tensor, classes: int) -> Tensor | None:
        """See Loss.weigh_classes: negatives over positives, and 1 for a class that lacks positives or negatives."""
        if self.class_weights == "none":
            return None
        return usable(absences(self.read(labels), classes) / occurrences(labels, classes))

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return the targets and the share of each in the mean, both [B, 1, C], and the class weights."""
        targets, classes = present(labels, logits), logits.shape[2]
        if self.off_label:
            targets = targets.clamp_(min=self.off_label if isinstance(self.off_label, float) else 1 / classes)
        if self.label_smoothing:
            targets = targets.mul_(1 - self.label_smoothing).add_(self.label_smoothing / classes)
        return targets, shares(labels, logits), None if weights is None else weights.to(logits)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        target, share, weights = targets
        p = logits.sigmoid()
        # max(z, 0) - t z - log(max(p, 1 - p)): where p is close to 1 the logarithm
        # has lost digits, but they do not show in the sum.
        losses = p.sub(0.5).abs_().add_(0.5).log_().neg_()
        if weights is None:
            losses.add_(logits.clamp(min=0)).addcmul_(target, logits, value=-1)
            return losses.mul_(share).sum((0, 2)), p.sub_(target).mul_(share)
        # (1 - t) z + (1 + (w - 1) t) log(1 + exp(-z))
        factor = 1 + (weights - 1) * target
        losses.add_((-logits).clamp_(min=0)).mul_(factor).addcmul_(1 - target, logits)
        return losses.mul_(share).sum((0, 2)), (1 - target - factor * (1 - p)).mul_(share)

    def curvature(self, function: LossFunction, labels: Tensor) -> Curvature:
        """See Loss.curvature."""
        targets, share, weights = function.targets(labels, torch.float64)
        parts = targets * share * (1 if weights is None else weights), (1 - targets) * share
        return LogisticCurvature(*(part[:, 0].t().contiguous() for part in parts))
