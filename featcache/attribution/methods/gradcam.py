"""GradCAM (Selvaraju et al., ICCV 2017) on cached maps: the backbone is not needed."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from featcache.attribution.batch import Batch
from featcache.attribution.methods.method import Method
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule


class GradCAM(Method):
    """GradCAM on the map that the head reads, from the store alone."""

    type: Literal["gradcam"] = "gradcam"

    def explain(self, heads: Sequence[HeadModule], feature: Feature, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another; the cached maps are read once for all."""
        maps = batch.cached(feature)[batch.images]
        for head in heads:
            yield upsample(gradcam(head, maps, batch.classes), batch.size)


def gradcam(head: HeadModule, maps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Explain a head's logits from the maps that it reads.

    head: reads the layer of the maps. maps: float32 [N, D, h, w]. classes: int64 [N], one for each map.
    Returns float32 [N, h, w]: the sum over channels of the map times the mean of its gradient over positions.
    Negative values are kept.
    """
    maps = maps.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(maps).gather(1, classes[:, None])
        (gradient,) = torch.autograd.grad(logits.sum(), maps)
    return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1)


def upsample(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Enlarge maps [N, h, w] to [N, size, size], bilinearly as captum does."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
