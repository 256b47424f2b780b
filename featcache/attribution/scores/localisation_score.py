"""What every localisation score is."""

from typing import ClassVar

import torch

from featcache.kinds import Kind

# Values of maps that are scored at a time: few, so that what a score makes of them stays in the processor's cache.
AT_ONCE = 2**19


class LocalisationScore(Kind):
    """Base class of localisation scores, which say how well a map points at the boxes of its class.

    A score is in 0..1, and higher is better unless its explanation says otherwise. heading: its name in tables and pictures. columns: of attribution.csv,
    that of the score and that of what a uniform map scores. lacking: what a map has not that has no score, such as
    "positive energy". The first line of a subclass's docstring is its explanation in the report.
    """

    heading: ClassVar[str]
    columns: ClassVar[tuple[str, str]]
    lacking: ClassVar[str]

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Score maps float32 [N, S, S] against masks bool [N, S, S] of the boxes: float64 [N], NaN for a map without."""
        raise NotImplementedError

    def measure_all(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Score any number of maps, a few at a time; see measure."""
        few = max(1, AT_ONCE // maps[0].numel())
        return torch.cat([self.measure(*part) for part in zip(maps.split(few), masks.split(few), strict=True)])

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return what a uniform map scores against each mask, the level of chance: float64 [N]."""
        return self.measure_all(torch.ones(masks.shape), masks)
