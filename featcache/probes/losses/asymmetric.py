"""The asymmetric loss."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from featcache.probes.losses.focused import focused
from featcache.probes.losses.loss import Loss, present, shares


class Asymmetric(Loss):
    """Asymmetric loss (Ridnik et al., ICCV 2021), the mean over the classes and images that are not ignored.

    Positives: -(1 - p)^gamma_pos log(p). Negatives: -m^gamma_neg log(1 - m) with m = max(p - clip, 0). The gradient is
    the full one of the paper's section 2.4; the authors' code treats the powers as constants by default.
    """

    type: Literal["asymmetric"] = "asymmetric"
    gamma_pos: Annotated[float, Field(ge=0, le=100)] = Field(0.0, description="exponent of positives")
    gamma_neg: Annotated[float, Field(ge=0, le=100)] = Field(4.0, description="exponent of negatives")
    clip: Annotated[float, Field(ge=0, le=0.9999)] = Field(
        0.05, description="probability below which a negative counts nothing"
    )

    capturable: ClassVar[bool] = True

    def targets(self, labels: Tensor, logits: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
        """Return which labels are positive, and the share of each in the mean, both [B, 1, C]."""
        return present(labels, logits) > 0, shares(labels, logits)

    def compute(self, logits: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """See Loss.compute."""
        positive, share = targets
        losses, gradient = focused(logits, self.gamma_pos)
        absent, slope = _shifted(logits, self.gamma_neg, self.clip)
        losses, gradient = torch.where(positive, losses, absent), torch.where(positive, gradient, slope)
        return losses.mul_(share).sum((0, 2)), gradient.mul_(share)


def _shifted(logits: Tensor, gamma: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return -m^gamma log(1 - m) with m = max(sigmoid(logits) - clip, 0), and its derivative by the logits."""
    p, rest = logits.sigmoid(), (-logits).sigmoid_()
    if not clip:
        log = F.softplus(logits)
        power = p.pow(gamma)
        return power * log, power * (p + gamma * rest * log)
    kept = (rest + clip).clamp_(max=1)  # 1 - m
    log, power = -kept.log(), (1 - kept).pow(gamma)
    # m^(gamma - 1) is infinite at 0 for gamma < 1, where the derivative is 0 nevertheless.
    steep = gamma * (1 - kept).clamp_(min=1e-30).pow(gamma - 1) * log
    return power * log, torch.where(kept < 1, p * rest * (power / kept + steep), 0.0)
