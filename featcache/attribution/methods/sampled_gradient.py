"""What methods have in common that average gradients over several inputs that are made of one image."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.forward import Forward
from featcache.attribution.methods.method import Explanation, Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule


class SampledGradient(Method):
    """Base of methods whose map is made of a weighted sum of gradients at several inputs.

    One forward pass of an input serves all probes and classes. An image's inputs go through the backbone together.
    """

    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """How many inputs are made of an image."""
        raise NotImplementedError

    def sample(self, image: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs [count, C, S, S] made of an image [C, S, S], and their weights [count].

        row: of the image in its split, for a seed, so that the inputs do not depend on what else is explained.
        """
        raise NotImplementedError

    def combine(self, image: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Make maps [..., S, S] of an image [C, S, S] and the weighted sums of gradients [..., C, S, S]."""
        raise NotImplementedError

    def passes(self, work: Work) -> Passes:
        """One forward pass an input, for every layer that probes read, and a backward pass an input for each map."""
        return Passes(work.images * work.layers * self.count, work.pairs * work.probes * self.count)

    def passes_alone(self, work: Work) -> Passes:
        """Both for each map."""
        return Passes(work.pairs * work.probes * self.count, work.pairs * work.probes * self.count)

    def explain(
        self, heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterator[torch.Tensor | Explanation]:
        """Yield the maps of one head after another, once all images are done for a block of heads."""
        batch.release()
        # The sums of one image have channels, which its maps have not.
        sums = batch.by_image.shape[1] * batch.inputs.shape[1]
        for block in batch.blocks(heads, max(sums, len(batch.targets))):
            yield from self._explain_block(block, feature, batch)

    def _explain_block(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> torch.Tensor:
        """Return the maps of heads: [heads, T, S, S]."""
        classes = batch.by_image
        shape = (len(heads), *classes.shape, batch.size, batch.size)
        maps = torch.empty(shape, device=batch.source.device)
        for number, (image, row) in enumerate(zip(batch.inputs, batch.rows, strict=True)):
            sums = image.new_zeros(len(heads), classes.shape[1], *image.shape)
            inputs, weights = self.sample(image, row)
            for part, own in zip(inputs.split(batch.source.at_once), weights.split(batch.source.at_once), strict=True):
                forward = Forward(batch.backbone, [feature], part, batch.source.passes)
                given = classes[number].expand(len(part), -1)
                for head, module in enumerate(heads):
                    for at, cotangent in enumerate(forward.cotangents(module, feature, given)):
                        sums[head, at] += torch.einsum("n,nchw->chw", own, forward.gradient(feature, cotangent))
            maps[:, number] = self.combine(image, sums)
        return maps.flatten(1, 2)
