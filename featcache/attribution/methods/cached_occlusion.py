"""Occlusion of the cached map."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from featcache.attribution.batch import Batch
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule


class CachedOcclusion(Method):
    """How much the logit falls when a window of the cached map is zero, averaged over the windows on a position.

    For a linear head and a window of 1 it is what the position adds to the logit.
    """

    type: Literal["cached_occlusion"] = "cached_occlusion"
    window: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="side of the window in positions of the map")
    paper: ClassVar[str] = "Zeiler and Fergus, ECCV 2014"

    def passes_alone(self, work: Work) -> Passes:
        """Through the backbone, every map takes a forward pass, which ends in a map that is occluded then."""
        return Passes(work.pairs * work.probes)

    @torch.no_grad()
    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another; windows lie at all places, cut off at no edge."""
        maps = batch.cached(feature)
        height, width = maps.shape[2:]
        down, across = min(self.window, height), min(self.window, width)
        places = [(y, x) for y in range(height - down + 1) for x in range(width - across + 1)]
        pairs = batch.images, batch.classes
        for head in heads:
            whole, falls = head(maps)[pairs], maps.new_zeros(len(batch.targets), height, width)
            count = maps.new_zeros(height, width)
            for y, x in places:
                window = slice(y, y + down), slice(x, x + across)
                occluded = maps.clone()
                occluded[:, :, *window] = 0
                falls[:, *window] += (whole - head(occluded)[pairs])[:, None, None]
                count[window] += 1
            yield upsample(falls / count, batch.size)
