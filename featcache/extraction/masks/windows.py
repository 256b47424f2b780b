"""The windows of occlusion."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from featcache.errors import BadInput
from featcache.extraction.masks.masking import Masking

Side = Annotated[int, Field(ge=1, le=100_000)]


class Windows(Masking):
    """Windows of zeros at all places of a lattice. The first variant is the image as it is."""

    type: Literal["occlusion"] = "occlusion"
    window: Side = Field(32, description="side of the window in pixels")
    stride: Side = Field(16, description="pixels from window to window")

    def _steps(self, size: int) -> int:
        """Return how many windows there are along a side; the last may reach over the edge."""
        return max(0, math.ceil((size - self.window) / self.stride)) + 1

    def number(self, size: int) -> int:
        """All windows, and the image itself, which comes first. Raises BadInput for windows larger than an image."""
        if self.window > size:
            raise BadInput(
                f"{self.type}: a window of {self.window} pixels is larger than an image, which has {size} a side"
            )
        return self._steps(size) ** 2 + 1

    def windows(self, size: int, first: int, end: int) -> torch.Tensor:
        """Return some of the windows, bool [n, S, S]. The first is empty."""
        windows = torch.zeros(end - first, size, size, dtype=torch.bool)
        for number in range(max(first, 1), end):
            y, x = (self.stride * step for step in divmod(number - 1, self._steps(size)))
            windows[number - first, y : y + self.window, x : x + self.window] = True
        return windows

    def masked(self, image: torch.Tensor, made: None, first: int, end: int) -> torch.Tensor:
        """Put zeros into the window, in the normalised image."""
        return image * ~self.windows(image.shape[-1], first, end).to(image.device)[:, None]
