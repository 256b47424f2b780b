"""Occlusion of the image."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.masked import Masked
from featcache.extraction.masks.windows import Windows

# Windows that are in memory at a time.
WINDOWS = 256


class Occlusion(Windows, Masked):
    """How much the probability falls when a window of the image is zero, averaged over the windows on a pixel."""

    type: Literal["occlusion"] = "occlusion"
    paper: ClassVar[str] = "Zeiler and Fergus, ECCV 2014"

    def maps(self, size: int, made: None, scores: torch.Tensor) -> torch.Tensor:
        """Average the falls of the windows that a pixel lies in."""
        fall = scores[:, :1] - scores
        falls, count = scores.new_zeros(len(scores), size * size), scores.new_zeros(size * size)
        for first in range(0, scores.shape[1], WINDOWS):
            part = fall[:, first : first + WINDOWS]
            windows = self.windows(size, first, first + part.shape[1]).to(scores).flatten(1)
            falls, count = falls + part @ windows, count + windows.sum(0)
        return (falls / count.clamp(min=1)).unflatten(1, (size, size))
