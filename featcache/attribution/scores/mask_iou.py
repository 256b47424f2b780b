"""Intersection over union of a map's large values and the pixels of the class."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.scores.localisation_score import LocalisationScore


class MaskIoU(LocalisationScore):
    """Mask IoU: intersection over union of the pixels of the class and those where a map is large.

    Large are values of at least `threshold` times the largest. With --protocol masks it is segmentation's IoU. All
    values of a uniform map are large.
    """

    type: Literal["mask_iou"] = "mask_iou"
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(0.3, description="share of the largest value")
    heading: ClassVar[str] = "mask IoU"
    columns: ClassVar[tuple[str, str]] = ("mask_iou", "mask_iou_uniform")
    lacking: ClassVar[str] = "positive value"

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compare the masks with the large values, pixel by pixel."""
        largest = maps.amax((1, 2), keepdim=True)
        large = maps >= self.threshold * largest
        shared = (large & masks).sum((1, 2)).double() / (large | masks).sum((1, 2))
        return shared.masked_fill(largest[:, 0, 0] <= 0, float("nan"))
