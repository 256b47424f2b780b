"""What methods have in common that change an image in many ways and see what becomes of the probability of a class."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule


@dataclass(frozen=True, eq=False)
class Image:
    """An image whose variants are explained. values: as the backbone takes it, [C, S, S]. row: in its split. id: its name.

    batch, feature: that it is explained in, and for.
    """

    values: torch.Tensor
    row: int
    id: str
    batch: Batch
    feature: Reading


class Perturbation(Method):
    """Base of methods that need the probabilities of an image's variants alone.

    The variants do not depend on the probe or the class, so that one forward pass of each serves all of them.
    """

    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False

    def count(self, size: int, channels: int) -> int:
        """Return how many variants an image has. size: of its side in pixels. channels: of the features."""
        raise NotImplementedError

    def begin(self, image: Image) -> Any:
        """Return what the variants of an image are made of; it is handed to variants() and maps()."""
        return None

    def variants(self, image: Image, made: Any, first: int, end: int) -> torch.Tensor:
        """Make some of the variants, by their numbers: [n, C, S, S]."""
        raise NotImplementedError

    def maps(self, size: int, made: Any, scores: torch.Tensor) -> torch.Tensor:
        """Make maps [Q, size, size] of the probabilities of all variants for Q pairs of probe and class, float32 [Q, N]."""
        raise NotImplementedError

    def passes(self, work: Work) -> Passes:
        """A forward pass a variant, for each layer that probes read through the backbone."""
        return Passes(work.images * self._variants(work))

    def passes_alone(self, work: Work) -> Passes:
        """The same for every map."""
        return Passes(work.pairs * work.probes * self._variants(work) // work.layers)

    def _variants(self, work: Work) -> int:
        return sum(self.count(work.size, channels) for channels in work.channels)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another, once all variants have been scored."""
        if not heads:
            return
        scored = []
        for values, row, own in zip(batch.inputs, batch.rows, batch.pairs_of, strict=True):
            image = Image(values, row, batch.source.id_of(row), batch, feature)
            made = self.begin(image)
            scored.append((own, made, self._scores(heads, image, made, batch.classes[own])))
        done = 0
        for block in batch.blocks(heads):
            maps = torch.empty(len(block), len(batch.targets), batch.size, batch.size, device=batch.source.device)
            for own, made, scores in scored:
                part = scores[done : done + len(block)]
                maps[:, own] = self.maps(batch.size, made, part.flatten(0, 1)).unflatten(0, part.shape[:2])
            yield from maps
            done += len(block)

    @torch.no_grad()
    def _scores(self, heads: Sequence[HeadModule], image: Image, made: Any, classes: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of K classes for all variants: float32 [heads, K, N]."""
        batch, parts = image.batch, []
        channels = image.batch.source.channels(image.feature)
        count, at_once = self.count(batch.size, channels), batch.source.at_once
        for first in range(0, count, at_once):
            inputs = self.variants(image, made, first, min(first + at_once, count))
            features = image.feature.of_images(batch.backbone, inputs)
            batch.source.passes.forward += len(inputs)
            parts.append(torch.stack([head.probabilities(features)[:, classes].t() for head in heads]))
        return torch.cat(parts, 2)
