"""Expected calibration error."""

from typing import Literal

from featcache.probes.scores.evidence import Sums
from featcache.probes.scores.metric import Estimate, Metric


class ECE(Metric[Sums]):
    """The mean gap between confidence and outcome, over 15 bins of equal width (Guo et al., ICML 2017)."""

    type: Literal["ece"] = "ece"
    title = "ECE"
    higher_is_better = False
    reads = Sums

    def estimate(self, evidence: Sums, leave_out: bool) -> Estimate:
        """Return the sums over bins of |gap|, over the number of pairs."""
        gaps, pairs = evidence.gaps, evidence.pairs
        total, count = gaps.sum(2), pairs.sum(1)
        left_out = None
        if leave_out:
            left_out = (total.unsqueeze(2) - gaps).abs_().sum(1) / (count.unsqueeze(1) - pairs)
        return Estimate(total.abs().sum(1) / count, left_out, count)
