"""The sigmoid focal loss."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from featcache.probes.losses.focused import focused
from featcache.probes.losses.loss import Loss, present, shares
from featcache.probes.part import Share


class Focal(Loss):
    """Sigmoid focal loss (Lin et al., ICCV 2017), the mean over the classes and images that are not ignored.

    -a (1 - q)^gamma log(q) with q the probability of the truth, and a = alpha for positives, 1 - alpha for negatives,
    as torchvision.ops.sigmoid_focal_loss.
    """

    type: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0, le=100)] = Field(2.0, description="exponent that plays down what is easy")
    alpha: Share = Field(0.25, description="weight of positives; negatives have 1 - alpha")

    capturable: ClassVar[bool] = True

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return the sign of each label, 1 or -1, and its weighted share in the mean, both [B, 1, C]."""
        sign = present(labels, logits) * 2 - 1
        return sign, shares(labels, logits) * (0.5 + (self.alpha - 0.5) * sign)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        sign, share = targets
        losses, gradient = focused(logits * sign, self.gamma)
        return losses.mul_(share).sum((0, 2)), gradient.mul_(share * sign)
