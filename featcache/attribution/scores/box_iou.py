"""Intersection over union of a box around a map's large values and the boxes of the class."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.scores.localisation_score import LocalisationScore


class BoxIoU(LocalisationScore):
    """Box IoU: intersection over union of the boxes of the class and the tightest box around a map's large values.

    Large are those of at least `threshold` times the largest. The box around a uniform map is the image.
    """

    type: Literal["box_iou"] = "box_iou"
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(0.3, description="share of the largest value")
    heading: ClassVar[str] = "box IoU"
    columns: ClassVar[tuple[str, str]] = ("box_iou", "box_iou_uniform")
    lacking: ClassVar[str] = "positive value"
    regions: ClassVar[tuple[str, ...]] = ("boxes",)

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compare the masks with the tightest box, pixel by pixel."""
        largest = maps.amax((1, 2), keepdim=True)
        large = maps >= self.threshold * largest
        box = _between(large.any(2))[:, :, None] & _between(large.any(1))[:, None, :]
        shared = (box & masks).sum((1, 2)).double() / (box | masks).sum((1, 2))
        return shared.masked_fill(largest[:, 0, 0] <= 0, float("nan"))


def _between(flags: torch.Tensor) -> torch.Tensor:
    """Return where a line lies between its first and its last flag: bool [N, S]."""
    return (flags.cumsum(1) > 0) & (flags.flip(1).cumsum(1).flip(1) > 0)
