"""What the methods of the CAM family have in common: maps from the features that a head reads, and their gradient."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch.nn import functional as F

from featcache.attribution.batch import Batch
from featcache.attribution.forward import logit_gradients
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule


class CAM(Method):
    """Base of methods that weigh the channels of the cached map by the gradient of the logit: no backbone is needed."""

    def weigh(self, maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Make maps [N, h, w] of features [N, D, h, w] and the logits' gradients of the same shape."""
        raise NotImplementedError

    def fixed_weights(self, slopes: torch.Tensor) -> torch.Tensor | None:
        """Return the channel weights where the gradient is the same at all positions, whatever the features.

        slopes: [..., D], the sum of the gradient over positions. Returns weights of the same shape, whose product with
        the features is divided by the number of positions, or None if weights depend on the features.
        """
        return None

    def finish(self, maps: torch.Tensor) -> torch.Tensor:
        """Make the last step on small maps [N, h, w]."""
        return maps

    def passes_alone(self, work: Work) -> Passes:
        """Through the backbone, every map takes a forward pass; its backward pass ends at the last layer."""
        return Passes(forward=work.pairs * work.probes)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another; the cached maps are read once for all.

        Affine heads give all their maps in one product, with the weights of every probe and class in the batch.
        """
        maps = batch.cached(feature)
        labels, at = batch.classes.unique(return_inverse=True)
        affine = [number for number, head in enumerate(heads) if head.head.commutes]
        products = iter(self._products([heads[n] for n in affine], maps, labels))
        for number, head in enumerate(heads):
            product = next(products) if number in affine else None
            if product is not None:
                small = product[at, batch.images]
            else:
                small = self.small(head, maps[batch.images], batch.classes)
            yield upsample(self.finish(small), batch.size)

    def small(self, head: HeadModule, maps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Explain a head's logits from features [N, D, h, w], a class of each, int64 [N]: float32 [N, h, w]."""
        (gradients,) = logit_gradients(head, maps, classes[:, None])
        return self.weigh(maps, gradients)

    def _products(
        self, heads: Sequence[HeadModule], maps: torch.Tensor, labels: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        """Return [classes, B, h, w] for each affine head, in one product, or None where weights are not fixed."""
        if not heads:
            return []
        weights = self.fixed_weights(torch.stack([head.slopes(maps.shape[1])[labels] for head in heads]))
        if weights is None:
            return [None] * len(heads)
        images, channels, height, width = maps.shape
        product = weights.flatten(0, 1) @ maps.transpose(0, 1).reshape(channels, -1) / (height * width)
        return product.view(len(heads), len(labels), images, height, width).unbind()


def upsample(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Enlarge maps [N, h, w] to [N, size, size], bilinearly as captum does.

    Two products take a quarter of the time of torch's interpolation, which is slow with one channel.
    """
    down, across = (_enlarging(side, size).to(maps) for side in maps.shape[1:])
    return down @ maps @ across.t()


@cache
def _enlarging(side: int, size: int) -> torch.Tensor:
    """Return the matrix [size, side] that enlarges a line of values."""
    return F.interpolate(torch.eye(side)[None], size, mode="linear", align_corners=False)[0].t().contiguous()
