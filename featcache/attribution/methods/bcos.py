"""The explanations of B-cos networks."""

from typing import ClassVar, Literal

import torch
from torch.nn.functional import avg_pool2d

from featcache.attribution.forward import Rule
from featcache.attribution.methods.gradient_method import GradientMethod
from featcache.attribution.rules import EXPLANATION_MODE, has_explanation_mode
from featcache.backbones.backbone import Backbone

# As the package bcos draws explanations: the side of the square over which opacity is averaged, and the quantile from which
# a pixel is opaque.
SMOOTH, OPAQUE = 15, 0.995


class BcosContributions(GradientMethod):
    """What each pixel contributes to the logit of a B-cos network, by the matrix that it multiplies this image by.

    In a network without biases the map sums to the logit without its offset.
    """

    type: Literal["bcos"] = "bcos"
    paper: ClassVar[str] = "Boehle et al., CVPR 2022; TPAMI 2024"
    rule: ClassVar[Rule] = EXPLANATION_MODE
    coloured: ClassVar[bool] = True

    def misfit(self, backbone: Backbone) -> str | None:
        """Other networks are not linear in this sense."""
        return None if has_explanation_mode(backbone) else "has no B-cos layers"

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over the six channels."""
        return (inputs * gradients).sum(1)

    def colour(self, image: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Draw the weights of a pixel as the colour that they look for (Boehle et al., CVPR 2022).

        Of a channel x and its complement 1 - x, the share of x in their positive weights is the brightness. Opacity is
        the length of the pixel's weights, where they speak for the class.
        """
        own, complement = gradient.double().clamp(min=0).unflatten(0, (2, 3))
        total = own + complement
        colours = torch.where(total > 0, own / total, 0)
        length = gradient.norm(dim=0) * ((image * gradient).sum(0) >= 0)
        opacity = avg_pool2d(length[None], SMOOTH, stride=1, padding=SMOOTH // 2)
        opacity = (opacity / opacity.quantile(OPAQUE).clamp(min=torch.finfo().tiny)).clamp(max=1)
        return (255 * torch.cat([colours, opacity])).round().byte().permute(1, 2, 0)
