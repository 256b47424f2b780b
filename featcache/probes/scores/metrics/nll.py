"""Negative log-likelihood."""

import math
from typing import Literal

from featcache.probes.scores.evidence import Sums
from featcache.probes.scores.jackknife import ratio
from featcache.probes.scores.metric import Estimate, Metric


class NLL(Metric[Sums]):
    """The mean cross-entropy of the probabilities that a probe gives, in nats."""

    type: Literal["nll"] = "nll"
    title = "NLL"
    higher_is_better = False
    bounds = (0, math.inf)
    reads = Sums

    def estimate(self, evidence: Sums, leave_out: bool) -> Estimate:
        """Return the mean loss of every probe."""
        return Estimate(*ratio(evidence.losses, evidence.divisors, leave_out))
