"""What methods have in common that make maps of the gradient of a logit with respect to the image."""

from collections.abc import Hashable, Iterator, Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.forward import PLAIN, Rule
from featcache.attribution.methods.method import Explanation, Method
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

    def colour(self, image: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Make a picture uint8 [S, S, 4] of an image and a gradient, both [C, S, S], if the method is coloured."""
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

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[Explanation]:
        """Yield the maps of one head after another."""
        for (maps,) in self.explain_together([self], heads, feature, batch):
            yield maps

    @classmethod
    def explain_together(
        cls, methods: Sequence["GradientMethod"], heads: Sequence[HeadModule], feature: Reading, batch: Batch
    ) -> Iterator[tuple[Explanation, ...]]:
        """Yield the maps of all methods, head by head. A backward pass explains a class of every image."""
        forward, classes = batch.forward(methods[0].rule), batch.by_image
        (images, each), inputs = classes.shape, forward.inputs.detach()
        for head in heads:
            made = [
                Explanation(torch.empty(images * each, batch.size, batch.size, device=batch.source.device))
                for _ in methods
            ]
            for number, cotangent in enumerate(forward.cotangents(head, feature, classes)):
                gradients = forward.gradient(feature, cotangent)
                for method, own in zip(methods, made, strict=True):
                    own.maps[number::each] = method.combine(inputs, gradients)
                    for pair in batch.pictured if method.coloured else ():
                        image, place = divmod(pair, each)
                        if place == number:
                            own.colours[pair] = method.colour(inputs[image], gradients[image]).cpu()
            yield tuple(made)
