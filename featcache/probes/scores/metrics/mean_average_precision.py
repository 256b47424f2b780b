"""Mean average precision."""

from typing import Literal

import torch
from torch import Tensor

from featcache.probes.scores.average_precision import average_precision
from featcache.probes.scores.evidence import Logits
from featcache.probes.scores.jackknife import nan_for_zero
from featcache.probes.scores.metric import Estimate, Metric


class MeanAveragePrecision(Metric[Logits]):
    """The mean over classes with a positive image of the non-interpolated average precision."""

    type: Literal["map"] = "map"
    aliases = ("mean_average_precision",)
    title = "mAP"
    tasks = ("multi-label",)
    class_column = "ap"
    reads = Logits

    def estimate(self, evidence: Logits, leave_out: bool) -> Estimate:
        """Return the means over classes.

        For a class with K positives, the change without an image is scaled by sqrt(1 - 1 / K), because average
        precision is a mean over the positives, of which the jackknife overstates the variance K / (K - 1) times.
        """
        probes, classes, images = evidence.logits.shape
        precisions = evidence.logits.new_full((probes, classes), torch.nan, dtype=torch.float64)
        positives = (evidence.labels == 1).sum(1)
        # A class without its only positive is gone altogether, so its change is not scaled.
        drawn_in = torch.where(positives > 1, 1 - 1 / positives.double(), 1).sqrt()
        changes = evidence.logits.new_zeros(probes, images, dtype=torch.float64)
        for c in positives.nonzero()[:, 0].tolist():
            labels, logits = evidence.labels[c], evidence.logits[:, c]
            known = (labels >= 0).nonzero()[:, 0]
            everywhere = len(known) == len(labels)
            logits, labels = (logits, labels) if everywhere else (logits[:, known], labels[known])
            precisions[:, c], change = average_precision(logits, labels == 1, leave_out)
            if change is not None:
                change *= drawn_in[c]
                changes = changes.add_(change) if everywhere else changes.index_add_(1, known, change)
        count, total = (positives > 0).sum(), precisions.nansum(1)
        if not leave_out:
            return Estimate(total / count, by_class=precisions)
        # A class without its only positive does not count.
        alone = ((evidence.labels == 1) & (positives == 1).unsqueeze(1)).sum(0)
        left_out = (total.unsqueeze(1) + changes) / nan_for_zero(count - alone)
        return Estimate(total / count, left_out, by_class=precisions)

    def chance(self, labels: Tensor, classes: int) -> float | None:
        """Return the mean over classes of (H + (n - H) (R - 1) / (n - 1)) / n; None without any positive image.

        n images have a known label, R of them are positive, and H is the n-th harmonic number (Bestgen 2015, "Exact
        expected average precision of the random baseline"). On few images that is well above the share R / n.
        """
        expected = []
        harmonics = (1 / torch.arange(1, len(labels) + 1, dtype=torch.float64)).cumsum(0).tolist()
        for n, positives in zip((labels >= 0).sum(0).tolist(), (labels == 1).sum(0).tolist(), strict=True):
            if positives:
                harmonic = harmonics[n - 1]
                expected.append((harmonic + (n - harmonic) * (positives - 1) / max(n - 1, 1)) / n)
        return sum(expected) / len(expected) if expected else None
