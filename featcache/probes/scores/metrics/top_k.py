"""Top-k accuracy."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from featcache.probes.scores.evidence import Ranks
from featcache.probes.scores.jackknife import ratio
from featcache.probes.scores.metric import Estimate, Metric


class _TopK(Metric[Ranks]):
    tasks = ("single-label",)
    reads = Ranks
    k: ClassVar[int]

    def estimate(self, evidence: Ranks, leave_out: bool) -> Estimate:
        hits = (evidence.ranks < self.k).double()
        return Estimate(*ratio(hits, torch.ones_like(hits), leave_out))

    def chance(self, labels: Tensor, classes: int) -> float | None:
        """Return k / C."""
        return min(self.k / classes, 1.0)


class Top1(_TopK):
    """The share of images whose class has the largest logit."""

    type: Literal["top1"] = "top1"
    aliases = ("acc", "accuracy", "top_1")
    title = "top-1"
    k = 1


class Top5(_TopK):
    """The share of images whose class is among the 5 largest logits."""

    type: Literal["top5"] = "top5"
    aliases = ("top_5",)
    title = "top-5"
    k = 5
