"""What every localisation score is."""

from typing import ClassVar

import torch

from featcache.kinds import Kind


class LocalisationScore(Kind):
    """Base class of localisation scores, which say how well a map points at the boxes of its class.

    A score is in 0..1, and higher is better unless its explanation says otherwise. heading: its name in tables and
    pictures. columns: of attribution.csv, that of the score and that of what a uniform map scores. lacking: what a map
    without a score lacks, such as "positive energy". The first line of a subclass's docstring is its explanation in the
    report.
    """

    heading: ClassVar[str]
    columns: ClassVar[tuple[str, str]]
    lacking: ClassVar[str]

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Score maps float32 [N, S, S] against masks bool [N, S, S] of the boxes: float64 [N], NaN for a map without.

        Both are on the device that maps are computed on.
        """
        raise NotImplementedError

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return what a uniform map scores against each mask, the level of chance: float64 [N]."""
        return self.measure(torch.ones(masks.shape, device=masks.device), masks)
