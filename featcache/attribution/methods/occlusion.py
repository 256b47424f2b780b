"""Occlusion of the image."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.methods.perturbation import MASKS, Image, Perturbation

Side = Annotated[int, Field(ge=1, le=100_000)]


class Occlusion(Perturbation):
    """How much the probability falls when a window of the image is zero, averaged over the windows on a pixel."""

    type: Literal["occlusion"] = "occlusion"
    window: Side = Field(32, description="side of the window in pixels")
    stride: Side = Field(16, description="pixels from window to window")
    paper: ClassVar[str] = "Zeiler and Fergus, ECCV 2014"

    def _steps(self, size: int) -> int:
        """Return how many windows there are along a side; the last may reach over the edge."""
        return max(0, math.ceil((size - self.window) / self.stride)) + 1

    def count(self, size: int, channels: int) -> int:
        """All windows, and the image itself, which comes first."""
        return self._steps(size) ** 2 + 1

    def _windows(self, size: int, first: int, end: int) -> torch.Tensor:
        """Return some of the windows, bool [n, S, S], of which the first is empty."""
        windows = torch.zeros(end - first, size, size, dtype=torch.bool)
        for number in range(max(first, 1), end):
            y, x = (self.stride * step for step in divmod(number - 1, self._steps(size)))
            windows[number - first, y : y + self.window, x : x + self.window] = True
        return windows

    def variants(self, image: Image, made: None, first: int, end: int) -> torch.Tensor:
        """Put zeros into the window, in the normalised image."""
        windows = self._windows(image.batch.size, first, end).to(image.values.device)
        return image.values * ~windows[:, None]

    def maps(self, image: Image, made: None, scores: torch.Tensor) -> torch.Tensor:
        """Average the falls of the windows that a pixel lies in."""
        size, fall = image.batch.size, scores[:, :1] - scores
        falls, count = scores.new_zeros(len(scores), size * size), scores.new_zeros(size * size)
        for first in range(0, scores.shape[1], MASKS):
            part = fall[:, first : first + MASKS]
            windows = self._windows(size, first, first + part.shape[1]).to(scores).flatten(1)
            falls, count = falls + part @ windows, count + windows.sum(0)
        return (falls / count.clamp(min=1)).unflatten(1, (size, size))
