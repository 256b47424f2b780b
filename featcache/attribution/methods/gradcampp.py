"""GradCAM++ on cached maps."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.cam import CAM


class GradCAMPlusPlus(CAM):
    """GradCAM with weights by which several objects count alike; what is positive of the map.

    The score that is explained is the exponential of the logit, as in the paper.
    """

    type: Literal["gradcampp"] = "gradcampp"
    paper: ClassVar[str] = "Chattopadhay et al., WACV 2018"

    def weigh(self, maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Weigh channels by alpha relu(gradient), alpha = g^2 / (2 g^2 + g^3 sum of the channel), by equation 19.

        The factor exp(logit) of the gradient would only scale the map.
        """
        below = 2 * gradients.square() + gradients.pow(3) * maps.sum((2, 3), keepdim=True)
        alpha = torch.where(below == 0, 0, gradients.square() / below)
        weights = (alpha * gradients.clamp(min=0)).sum((2, 3), keepdim=True)
        return (weights * maps).sum(1)

    def finish(self, maps: torch.Tensor) -> torch.Tensor:
        """Keep what is positive."""
        return maps.clamp(min=0)
