"""Insertion (Petsiuk et al., RISE, BMVC 2018)."""

from typing import ClassVar, Literal

import torch
from torchvision.transforms.functional import gaussian_blur

from featcache.attribution.scores.faithfulness import Faithfulness

# The side of the blur's kernel and its deviation, in pixels of the input, as in the paper's code.
KERNEL, DEVIATION = 11, 5.0


class Insertion(Faithfulness):
    """Insertion: the mean probability of the class while the pixels of a blurred image become sharp, the largest of the map first.

    Higher is better.
    """

    type: Literal["insertion"] = "insertion"
    heading: ClassVar[str] = "insertion"
    columns: ClassVar[tuple[str, str]] = ("insertion", "insertion_uniform")

    def ends(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the blurred images, and the images."""
        return gaussian_blur(images, [KERNEL, KERNEL], [DEVIATION, DEVIATION]), images
