"""Compactness: the Gini index of a map (Chalasani et al., ICML 2020, who call it sparseness)."""

from typing import ClassVar, Literal

import torch

from featcache.attribution.scores.localisation_score import LocalisationScore


class Compactness(LocalisationScore):
    """Compactness: the Gini index of a map's positive values; 0 if all pixels are equal, nearly 1 if one has all.

    It knows nothing of boxes: a compact map can be compact in the wrong place.
    """

    type: Literal["compactness"] = "compactness"
    heading: ClassVar[str] = "compactness"
    columns: ClassVar[tuple[str, str]] = ("compactness", "compactness_uniform")
    lacking: ClassVar[str] = "positive value"
    regions: ClassVar[tuple[str, ...]] = ()

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return sum((2 i - n - 1) a_i) / (n sum(a_i)) over the n values in order."""
        values = maps.flatten(1).double().clamp(min=0).sort(1).values
        count = values.shape[1]
        ranks = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
        return values @ ranks / (count * values.sum(1))

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return 0."""
        return torch.zeros(len(masks), dtype=torch.float64)
