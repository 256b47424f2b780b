"""Average precision of many probes, and of each without any one image, from one sort a probe."""

import numpy as np
import torch
from torch.nn import functional as F

# Scores that are sorted at a time: on a CPU they stay in the cache, on a GPU a step costs its launches.
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


@torch.no_grad()
def average_precision(scores, labels, leave_out=False):
    """Non-interpolated average precision of one class, as scikit-learn's average_precision_score.

    scores: [P, n]. labels: bool [n], one of them true at least. Returns float64 [P], and with leave_out
    float64 [P, n], else None: what is added to it when image i is left out; without its only positive
    a class counts as 0. Images of equal score are one threshold.

    With s_j the score of positive j of K, H_j and N_j how many positives and images score s_j or more:
    the mean over j of H_j / N_j. Without image i, N_j is less by one for every j that scores no more than
    it, and so is H_j if it is positive.
    """
    positives = int(labels.sum())
    size = max(AT_ONCE[scores.device.type] // len(labels), 1)
    values, changes = zip(
        *(_of_piece(piece, labels, positives, leave_out) for piece in scores.split(size)), strict=True
    )
    return torch.cat(values), torch.cat(changes) if leave_out else None


def _of_piece(scores, labels, positives, leave_out):
    # numpy's sort is several times faster than torch's on a CPU, and of float64 than of float32.
    falling = -scores.double()
    order = torch.from_numpy(np.argsort(falling.numpy(), axis=1)) if falling.is_cpu else falling.argsort(dim=1)
    places = (
        labels.expand(order.shape).gather(1, order).nonzero()[:, 1].view(-1, positives)
    )  # [P, K]: ranks of the positives
    ranked = falling.gather(1, order)
    found = ranked.gather(1, places)
    images = torch.searchsorted(ranked, found, right=True)  # N
    hits = torch.searchsorted(found, found, right=True)  # H
    # One after another, so that a probe's sum does not depend on its company.
    sums = (hits.double() / images).cumsum(1)
    value = sums[:, -1] / positives
    if not leave_out:
        return value, None
    fewer = (images - 1).clamp(min=1).double()
    # Before an image come the positives that score more than it. Of a negative only their number counts.
    tail = _sums_from(hits / (fewer * images)) / positives
    change = torch.empty_like(falling)
    change.scatter_(1, order, tail.gather(1, _before(images, falling.shape[1])))
    # Of a positive also that it is itself no longer found.
    before = torch.searchsorted(found, found)
    precision = (hits - 1) / fewer
    rest = (F.pad(sums, (1, 0)) + _sums_from(precision)).gather(1, before) - precision
    change.scatter_(1, order.gather(1, places), rest / max(positives - 1, 1) - value.unsqueeze(1))
    return value, change


def _sums_from(values):
    """Sum values [P, K] from each to the last: [P, K + 1], the last of them 0."""
    return F.pad(values.flip(1).cumsum(1).flip(1), (0, 1))


def _before(ends, n):
    """How many of the ends [P, K] have passed at each of n ranks: int64 [P, n]."""
    passed = torch.zeros(len(ends), n + 1, dtype=torch.int64, device=ends.device)
    passed.scatter_add_(1, ends, torch.ones_like(ends))
    return passed[:, :-1].cumsum(1)
