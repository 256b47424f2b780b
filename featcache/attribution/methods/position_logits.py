"""The logits of single positions."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.head import Head
from featcache.probes.heads.module import HeadModule


class PositionLogits(Method):
    """The logit that a head gives to each position of the cached map, whose mean and the offset are the head's logit."""

    type: Literal["position_logits"] = "position_logits"
    paper: ClassVar[str] = "Zhou et al., CVPR 2016 (CAM), for heads of any depth"

    def unfit(self, head: Head, reading: Reading) -> str | None:
        """A head that averages the features, or attends to them, has no logits of positions."""
        if not head.commutes and (head.averages_features or head.reads_tokens):
            return f"has a head of type {head.type} that brings the positions together before its layers"
        return super().unfit(head, reading)

    def passes_alone(self, work: Work) -> Passes:
        """Through the backbone, every map takes a forward pass."""
        return Passes(work.pairs * work.probes)

    @torch.no_grad()
    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another."""
        maps = batch.cached(feature)
        for head in heads:
            logits = head.position_logits(maps)
            yield upsample(logits[batch.images, batch.classes], batch.size)
