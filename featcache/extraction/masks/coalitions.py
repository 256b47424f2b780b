"""The coalitions of superpixels that kernel SHAP looks at."""

from math import comb
from typing import Annotated, Literal

import torch
from pydantic import Field

from featcache.extraction.masks.superpixels import Superpixels

# All coalitions of more superpixels than this are not looked at, whatever the number of samples.
MOST_ENUMERATED = 16


class Coalitions(Superpixels):
    """Coalitions of superpixels: first that of all, then that of none.

    The others are all there are, where `samples` suffices for that, and the image again for what is left over. Else they
    are drawn by Shapley's kernel, each followed by the coalition of all other superpixels (Covert and Lee, AISTATS 2021).
    """

    type: Literal["kernel_shap"] = "kernel_shap"
    samples: Annotated[int, Field(ge=4, le=1_000_000)] = Field(1000, description="coalitions of superpixels")

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See Superpixels.draw."""
        kept = torch.ones(self.samples, count, dtype=torch.float64)
        kept[1] = 0
        if self.enumerates(count):
            every = torch.arange(1, 2**count - 1)
            kept[2 : 2**count] = ((every[:, None] >> torch.arange(count)) & 1).double()
            return kept
        sizes, pairs = torch.arange(1, count, dtype=torch.float64), -(-(self.samples - 2) // 2)
        drawn = 1 + torch.multinomial(1 / (sizes * (count - sizes)), pairs, replacement=True, generator=generator)
        ranks = torch.rand(pairs, count, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
        chosen = (ranks < drawn[:, None]).double()
        kept[2:] = torch.stack([chosen, 1 - chosen], 1).flatten(0, 1)[: self.samples - 2]
        return kept

    def weights(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the weights of drawn coalitions in the regression, float64 [N], 0 for the first two.

        What is drawn by Shapley's kernel has equal weights; of all coalitions, the kernel is the weight.
        """
        weights, count = kept.new_zeros(len(kept)), kept.shape[1]
        if not self.enumerates(count):
            weights[2:] = 1
            return weights
        kernel = [0.0, *((count - 1) / (comb(count, n) * n * (count - n)) for n in range(1, count))]
        weights[2 : 2**count] = kept.new_tensor(kernel)[kept[2 : 2**count].sum(1).long()]
        return weights

    def enumerates(self, count: int) -> bool:
        """Return whether all coalitions of `count` superpixels are looked at."""
        return count <= MOST_ENUMERATED and 2**count <= self.samples
