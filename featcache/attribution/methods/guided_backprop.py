"""Guided backpropagation."""

from typing import ClassVar, Literal

import torch
from torch import nn

from featcache.attribution.forward import Rule
from featcache.attribution.methods.gradient_method import GradientMethod
from featcache.attribution.rules import GUIDED
from featcache.backbones.backbone import Backbone


class GuidedBackprop(GradientMethod):
    """The gradient of the logit, of which every ReLU lets only positive values back, summed over channels."""

    type: Literal["guided_backprop"] = "guided_backprop"
    serves: ClassVar[str] = "networks with ReLU modules"
    paper: ClassVar[str] = "Springenberg et al., ICLR Workshop 2015"
    rule: ClassVar[Rule] = GUIDED

    def misfit(self, backbone: Backbone) -> str | None:
        """Without ReLU modules it would be the plain gradient."""
        return None if any(isinstance(m, nn.ReLU) for m in backbone.modules()) else "has no ReLU"

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Sum over channels."""
        return gradients.sum(1)
