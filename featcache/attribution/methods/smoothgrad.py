"""SmoothGrad."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.methods.sampled_gradient import SampledGradient

# Images get noise of their own, whatever else is explained.
STRIDE = 1_000_003


class SmoothGrad(SampledGradient):
    """The mean gradient over noisy copies of the image; of it the largest absolute value over channels."""

    type: Literal["smoothgrad"] = "smoothgrad"
    samples: Annotated[int, Field(ge=1, le=100_000)] = Field(50, description="noisy copies")
    noise: Annotated[float, Field(ge=0, le=10)] = Field(
        0.15, description="deviation of the noise, as a share of the image's largest value minus its smallest"
    )
    seed: int = Field(0, description="draws the noise")
    paper: ClassVar[str] = "Smilkov et al., 2017"

    @property
    def count(self) -> int:
        """The noisy copies."""
        return self.samples

    def sample(self, image: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Add Gaussian noise, which is drawn on the CPU."""
        generator = torch.Generator().manual_seed((self.seed * STRIDE + row) % 2**63)
        noise = torch.randn(self.samples, *image.shape, generator=generator, dtype=image.dtype).to(image.device)
        inputs = image + noise * (self.noise * (image.max() - image.min()))
        return inputs, image.new_full((self.samples,), 1 / self.samples)

    def combine(self, image: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Return the largest absolute value over channels."""
        return gradients.abs().amax(-3)
