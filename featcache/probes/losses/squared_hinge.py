"""The squared hinge loss of linear support vector machines."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featcache.probes.losses.curvature import Curvature, SquaredHingeCurvature
from featcache.probes.losses.loss import Loss, LossFunction, present, shares
from featcache.probes.part import Positive


class SquaredHinge(Loss):
    """Squared hinge max(0, 1 - y z)^2 with y = 1 or -1, the mean over the classes and images that are not ignored.

    Positives are weighed by positive_weight, as by class_weight={1: ...} of scikit-learn's LinearSVC.
    """

    type: Literal["squared_hinge"] = "squared_hinge"
    positive_weight: Positive = Field(1.0, description="weight of positives; negatives have 1")

    aliases: ClassVar[tuple[str, ...]] = ("squaredhinge",)
    convex: ClassVar[bool] = True

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return the sign of each label, 1 or -1, and its weighted share in the mean, both [B, 1, C]."""
        positive = present(labels, logits)
        return 2 * positive - 1, shares(labels, logits) * (1 + (self.positive_weight - 1) * positive)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        sign, share = targets
        short = (1 - sign * logits).clamp_(min=0)
        pushed = short * share
        return (short * pushed).sum((0, 2)), pushed.mul_(-2 * sign)

    def curvature(self, function: LossFunction, labels: Tensor) -> Curvature:
        """See Loss.curvature."""
        sign, share = function.targets(labels, torch.float64)
        return SquaredHingeCurvature(*(part[:, 0].t().contiguous() for part in (share, sign)))
