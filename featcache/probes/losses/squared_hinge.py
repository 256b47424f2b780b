"""The squared hinge loss of support vector machines."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from featcache.probes.losses.loss import Loss, present, shares
from featcache.probes.part import Positive


class SquaredHinge(Loss):
    """The squared hinge of each class's margin, the mean over the classes and images that are not ignored."""

    type: Literal["squared_hinge"] = "squared_hinge"
    positive_weight: Positive = Field(1.0, description="weight of positives; negatives have 1")

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return signs, 1 or -1, and the share of each label in the mean, both [B, 1, C]."""
        there = present(labels, logits)
        return 2 * there - 1, shares(labels, logits) * (1 + (self.positive_weight - 1) * there)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        signs, share = targets
        short = (1 - signs * logits).clamp_(min=0)
        return (short.square() * share).sum((0, 2)), -2 * signs * short * share
