"""The gradient itself."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.gradient_method import GradientMethod


class Gradient(GradientMethod):
    """The largest absolute gradient of the logit over the channels of a pixel, also called saliency."""

    type: Literal["gradient"] = "gradient"
    paper: ClassVar[str] = "Simonyan et al., ICLR Workshop 2014"

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Return the largest absolute value over channels."""
        return gradients.abs().amax(1)
