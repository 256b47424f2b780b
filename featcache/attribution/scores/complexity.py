"""Complexity: the entropy of a map (Bhatt et al., IJCAI 2020)."""

import math
from typing import ClassVar, Literal

import torch

from featcache.attribution.scores.localisation_score import LocalisationScore


class Complexity(LocalisationScore):
    """Complexity: the entropy of a map's positive values, as a share of a uniform map's; lower is simpler.

    Times log2(pixels) it is the entropy in bits.
    """

    type: Literal["complexity"] = "complexity"
    heading: ClassVar[str] = "complexity"
    columns: ClassVar[tuple[str, str]] = ("complexity", "complexity_uniform")
    lacking: ClassVar[str] = "positive value"
    regions: ClassVar[tuple[str, ...]] = ()
    higher_is_better: ClassVar[bool] = False

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return the entropy over the logarithm of the number of pixels."""
        values = maps.flatten(1).double().clamp(min=0)
        shares = values / values.sum(1, keepdim=True)
        return torch.special.entr(shares).sum(1) / math.log(values.shape[1])

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return 1."""
        return torch.ones(len(masks), dtype=torch.float64)
