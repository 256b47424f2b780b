"""Score-CAM."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.perturbation import Image, Perturbation


class ScoreCAM(Perturbation):
    """Channels of the map, weighed by the softmax of the probabilities of images that they mask; what is positive.

    A mask is a channel, enlarged to the image and stretched to 0..1. It serves all probes and classes.
    """

    type: Literal["scorecam"] = "scorecam"
    reads_maps: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al., CVPR Workshops 2020"

    def count(self, size: int, channels: int) -> int:
        """A mask for each channel."""
        return channels

    def begin(self, image: Image) -> torch.Tensor:
        """Return the channels of the cached map, [D, h, w]."""
        return image.batch.cached(image.feature)[image.batch.rows.index(image.row)]

    def variants(self, image: Image, made: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Multiply the normalised image by the masks; a channel without variation leaves nothing."""
        masks = upsample(made[first:end], image.batch.size)
        low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
        masks = torch.where(high > low, (masks - low) / (high - low).clamp(min=torch.finfo(masks.dtype).tiny), 0)
        return image.values * masks[:, None]

    def maps(self, size: int, made: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sum the channels by the softmax of their scores, keep what is positive, and enlarge it."""
        weights = scores.softmax(1).to(made)
        return upsample(torch.einsum("qd,dhw->qhw", weights, made).clamp(min=0), size)
