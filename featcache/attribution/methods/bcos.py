"""The explanations of B-cos networks."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.forward import Rule
from featcache.attribution.methods.gradient_method import GradientMethod
from featcache.attribution.rules import EXPLANATION_MODE, has_explanation_mode
from featcache.backbones.backbone import Backbone


class BcosContributions(GradientMethod):
    """What each pixel contributes to the logit of a B-cos network, by the matrix that it multiplies this image by.

    In a network without biases the map sums to the logit without its offset.
    """

    type: Literal["bcos"] = "bcos"
    paper: ClassVar[str] = "Boehle et al., CVPR 2022; TPAMI 2024"
    rule: ClassVar[Rule] = EXPLANATION_MODE

    def misfit(self, backbone: Backbone) -> str | None:
        """Other networks are not linear in this sense."""
        return None if has_explanation_mode(backbone) else "has no B-cos layers"

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over the six channels."""
        return (inputs * gradients).sum(1)
