"""Balanced accuracy."""

from typing import Literal

from torch import Tensor

from featcache.probes.scores.evidence import Ranks
from featcache.probes.scores.jackknife import nan_for_zero
from featcache.probes.scores.metric import Estimate, Metric


class BalancedAccuracy(Metric[Ranks]):
    """The mean over the classes in the split of their recall (top-1)."""

    type: Literal["balanced_accuracy"] = "balanced_accuracy"
    title = "balanced accuracy"
    tasks = ("single-label",)
    reads = Ranks

    def estimate(self, evidence: Ranks, leave_out: bool) -> Estimate:
        """Return the means over the classes that the images have."""
        labels = evidence.labels
        hits = (evidence.ranks == 0).double()  # [p, N]
        images = labels.bincount(minlength=evidence.classes)  # [C]
        right = hits.new_zeros(len(hits), evidence.classes).index_add_(1, labels, hits)
        recalls = right / images.clamp(min=1)
        total, count = recalls.sum(1), (images > 0).sum()
        if not leave_out:
            return Estimate(total / count)
        # A class without its only image does not count.
        fewer = images[labels] - 1
        without = (right[:, labels] - hits) / fewer.clamp(min=1)
        left_out = total.unsqueeze(1) - recalls[:, labels] + without
        return Estimate(total / count, left_out / nan_for_zero(count - (fewer == 0).long()))

    def chance(self, labels: Tensor, classes: int) -> float | None:
        """Return 1 / C."""
        return min(1 / classes, 1.0)
