"""Integrated gradients."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from featcache.attribution.batch import Batch
from featcache.attribution.methods.method import Explanation
from featcache.attribution.methods.sampled_gradient import SampledGradient
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule

GAP = "completeness_gap"


class IntegratedGradients(SampledGradient):
    """The input times the mean gradient on the way to it from an input of zeros, summed over channels.

    The way is cut by Gauss and Legendre's rule. completeness_gap is what the map lacks to sum to the logit's change on
    the way, as a share of that change.
    """

    type: Literal["intgrad"] = "intgrad"
    steps: Annotated[int, Field(ge=1, le=10_000)] = Field(50, description="inputs on the way")
    paper: ClassVar[str] = "Sundararajan et al., ICML 2017"
    columns: ClassVar[tuple[str, ...]] = (GAP,)

    @property
    def count(self) -> int:
        """The inputs on the way."""
        return self.steps

    def sample(self, image: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs on the way from zeros to the image, with the weights of Gauss and Legendre's rule."""
        points, weights = (torch.tensor(values).to(image) for values in np.polynomial.legendre.leggauss(self.steps))
        return (1 + points)[:, None, None, None] / 2 * image, weights / 2

    def combine(self, image: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply, and sum over channels."""
        return (image * gradients).sum(-3)

    def passes(self, work: Work) -> Passes:
        """The two ends of the way come on top, for the gap."""
        return super().passes(work) + Passes(2 * work.images * work.layers)

    def explain(self, heads: Sequence[HeadModule], feature: Reading, batch: Batch) -> Iterator[Explanation]:
        """Yield the maps of one head after another, with their gaps."""
        with torch.no_grad():
            ends = [
                feature.of_images(batch.backbone, inputs) for inputs in (batch.inputs, torch.zeros_like(batch.inputs))
            ]
        batch.source.passes.forward += 2 * len(batch.inputs)
        for head, maps in zip(heads, super().explain(heads, feature, batch), strict=True):
            assert isinstance(maps, torch.Tensor)
            logits = [head(end)[batch.images, batch.classes].double() for end in ends]
            change = logits[0] - logits[1]
            yield Explanation(maps, {GAP: (maps.double().sum((1, 2)) - change).abs() / change.abs()})
