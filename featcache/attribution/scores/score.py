"""What every score of maps is."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from featcache.attribution.batch import Batch
from featcache.attribution.passes import Passes, Work
from featcache.attribution.reading import Reading
from featcache.kinds import Kind
from featcache.probes.heads.module import HeadModule

# From the maps of a batch for one head, float32 [T, S, S], and the head's number to their scores and to those of a
# uniform map, both float64 [T], NaN where there is none.
Judge = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class Score(Kind):
    """Base class of scores, which say how good a map is.

    A score is in 0..1. higher_is_better: else lower is, as its explanation says. heading: its name in tables and
    pictures. columns: of attribution.csv, that of the score and that of what a uniform map scores. lacking: what a map
    has not that has no score, such as "positive energy". regions: which regions of protocols it looks at, () if at
    none. runs_backbone: whether it needs the backbone and the images. The first line of a subclass's docstring is its
    explanation in the report.
    """

    heading: ClassVar[str]
    columns: ClassVar[tuple[str, str]]
    lacking: ClassVar[str]
    regions: ClassVar[tuple[str, ...]] = ()
    runs_backbone: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True

    def judge(self, batch: Batch, heads: Sequence[tuple[HeadModule, Reading]]) -> Judge:
        """Return what scores the maps of a batch. heads: with the maps that they read."""
        raise NotImplementedError

    def passes(self, work: Work, methods: int) -> Passes:
        """Return the passes through the backbone that the score takes for the maps of so many methods."""
        return Passes()

    def passes_alone(self, work: Work, methods: int) -> Passes:
        """Return the passes where every map is scored on its own."""
        return Passes()
