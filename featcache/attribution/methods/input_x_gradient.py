"""Input x gradient through backbone and head."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.gradient_method import GradientMethod


class InputXGradient(GradientMethod):
    """The normalised input times the gradient of the logit, summed over channels."""

    type: Literal["input_x_gradient"] = "input_x_gradient"
    paper: ClassVar[str] = "Shrikumar et al., 2016"

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over channels."""
        return (inputs * gradients).sum(1)
