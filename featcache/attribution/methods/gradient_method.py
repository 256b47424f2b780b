"""What methods have in common that make maps of the gradient of a logit with respect to the image."""

from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.forward import PLAIN, Rule
from featcache.attribution.methods.method import Method
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule


class GradientMethod(Method):
    """Base of methods that need one gradient for each map.

    One forward pass of an image serves all probes, classes and layers, and one backward pass a pair of probe and class
    all methods of the same rule. rule: how backbone and head compute; see featcache.attribution.forward.
    """

    runs_backbone: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = False
    rule: ClassVar[Rule] = PLAIN

    def combine(self, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Make maps [B, S, S] of images and gradients, both [B, C, S, S]."""
        raise NotImplementedError

    @property
    def shared(self) -> Hashable:
        """Methods of one rule share their passes."""
        return self.rule

    def passes(self, work: Work) -> Passes:
        """A forward pass for each image, a backward pass for each map."""
        return Passes(work.images, work.pairs * work.probes)

    def passes_alone(self, work: Work) -> Passes:
        """Both for each map."""
        return Passes(work.pairs * work.probes, work.pairs * work.probes)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the maps of one head after another."""
        for (maps,) in self.explain_together([self], heads, feature, batch):
            yield maps

    @classmethod
    def explain_together(
        cls, methods: Sequence["GradientMethod"], heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the maps of all methods, head by head. A backward pass explains a class of every image."""
        forward, classes = batch.forward(methods[0].rule), batch.by_image
        shape = (len(classes), classes.shape[1], batch.size, batch.size)
        for head in heads:
            maps = [torch.empty(shape, device=batch.source.device) for _ in methods]
            for number, cotangent in enumerate(forward.cotangents(head, feature, classes)):
                gradients = forward.gradient(feature, cotangent)
                for method, own in zip(methods, maps, strict=True):
                    own[:, number] = method.combine(forward.inputs.detach(), gradients)
            yield tuple(own.flatten(0, 1) for own in maps)
