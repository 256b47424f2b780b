"""What every attribution method is."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.feature import Feature
from featcache.kinds import Kind
from featcache.probes.heads.module import HeadModule


class Method(Kind):
    """Base class of attribution methods, which say how much each pixel of an image speaks for a class.

    runs_backbone: whether the method needs the backbone and the images, besides the cached map that every head reads.
    """

    runs_backbone: ClassVar[bool] = False

    def explain(self, heads: Sequence[HeadModule], feature: Feature, batch: Batch) -> Iterable[torch.Tensor]:
        """Compute the maps of a batch for heads that all read one feature, a spatial one, so that they can share work.

        Returns float32 [T, S, S] for each head, in their order: one map for each of the batch's T pairs of an image
        and a class, S = batch.size pixels a side. Positive values speak for the class. A generator holds the maps
        of one head at a time.
        """
        raise NotImplementedError
