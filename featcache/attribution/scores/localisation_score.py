"""What every localisation score is."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.reading import Reading
from featcache.attribution.scores.score import Judge, Score
from featcache.probes.heads.module import HeadModule

# Values of maps that are scored at a time: few, so that what a score makes of them stays in the processor's cache.
AT_ONCE = 2**18


class LocalisationScore(Score):
    """Base class of localisation scores, which say how well a map points at the objects of its class.

    See Score for the other members. Scores that do not look at the objects say `regions = ()`.
    """

    regions: ClassVar[tuple[str, ...]] = ("boxes", "masks")

    def measure(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Score maps float32 [N, S, S] against masks bool [N, S, S] of objects: float64 [N], NaN for a map without."""
        raise NotImplementedError

    def measure_all(self, maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Score any number of maps, a few at a time; see measure."""
        few = max(1, AT_ONCE // maps[0].numel())
        return torch.cat([self.measure(*part) for part in zip(maps.split(few), masks.split(few), strict=True)])

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        """Return what a uniform map scores against each mask, the level of chance: float64 [N]."""
        return self.measure_all(torch.ones(masks.shape), masks)

    def chance(self, masks: torch.Tensor, void: torch.Tensor | None) -> torch.Tensor:
        """Return the level of chance where some pixels do not count, float64 [N]. void: them, bool [N, S, S]."""
        if void is None or not self.regions:
            return self.uniform(masks)
        return self.measure_all((~void).float(), masks)

    def judge(self, batch: Batch, heads: Sequence[tuple[HeadModule, Reading]]) -> Judge:
        """See Score. Maps are zero where pixels do not count, so that what they say there is neither right nor wrong."""
        masks, void = batch.masks, batch.void
        levels = self.chance(masks, void)

        def judge(maps: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
            seen = maps if void is None or not self.regions else maps.masked_fill(void, 0)
            return self.measure_all(seen, masks).double(), levels.double()

        return judge
