"""GradCAM on cached maps."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.cam import CAM


class GradCAM(CAM):
    """GradCAM on the map that the head reads, from the store alone."""

    type: Literal["gradcam"] = "gradcam"
    paper: ClassVar[str] = "Selvaraju et al., ICCV 2017"

    def weigh(self, maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Weigh each channel by the mean of its gradient over positions. Negative values are kept."""
        return (gradients.mean((2, 3), keepdim=True) * maps).sum(1)

    def fixed_weights(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return the gradient itself."""
        return slopes
