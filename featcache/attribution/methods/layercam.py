"""LayerCAM on cached maps."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.cam import CAM


class LayerCAM(CAM):
    """The features times their positive gradients, summed over channels, and what is positive of it."""

    type: Literal["layercam"] = "layercam"
    paper: ClassVar[str] = "Jiang et al., TIP 2021"

    def weigh(self, maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Weigh every position of a channel by its own positive gradient."""
        return (gradients.clamp(min=0) * maps).sum(1)

    def fixed_weights(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return the positive gradients."""
        return slopes.clamp(min=0)

    def finish(self, maps: torch.Tensor) -> torch.Tensor:
        """Keep what is positive."""
        return maps.clamp(min=0)
