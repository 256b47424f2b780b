"""Average precision of many probes, over all images and without each one of them, from a single sort for each probe."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Number of logits that are sorted at a time. On a CPU they should stay in the cache; on a GPU few, large steps are best.
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


@torch.no_grad()
def average_precision(logits: Tensor, labels: Tensor, leave_out: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the non-interpolated average precision of one class, like scikit-learn's average_precision_score.

    logits: [P, n]. labels: bool [n], at least one of them true. Returns float64 [P], and with leave_out also the change
    when image i is left out, float64 [P, n], else None. A class without its only positive has the value 0. Images with
    equal logits share a threshold.

    Let s_j be the logit of the j-th of K positives, and let H_j positives and N_j images have logits of at least s_j.
    The result is the mean over j of H_j / N_j. Without image i, N_j falls by one for every j whose logit is not above
    that of i, and so does H_j if i is positive.
    """
    positives = int(labels.sum())
    size = max(AT_ONCE[logits.device.type] // len(labels), 1)
    values, changes = [], []
    for piece in logits.split(size):
        value, change = _of_piece(piece, labels, positives, leave_out)
        values.append(value)
        if change is not None:
            changes.append(change)
    return torch.cat(values), torch.cat(changes) if leave_out else None


def _of_piece(logits: Tensor, labels: Tensor, positives: int, leave_out: bool) -> tuple[Tensor, Tensor | None]:
    # On a CPU numpy sorts several times faster than torch, and float64 faster than float32.
    falling = -logits.double()
    order = torch.from_numpy(np.argsort(falling.numpy(), axis=1)) if falling.is_cpu else falling.argsort(dim=1)
    # The ranks of the positives, [P, K].
    places = labels.expand(order.shape).gather(1, order).nonzero()[:, 1].view(-1, positives)
    ranked = falling.gather(1, order)
    thresholds = ranked.gather(1, places)
    images = torch.searchsorted(ranked, thresholds, right=True)  # N
    hits = torch.searchsorted(thresholds, thresholds, right=True)  # H
    # cumsum adds one number after another, so that the result does not depend on which probes are computed together.
    sums = (hits.double() / images).cumsum(1)
    value = sums[:, -1] / positives
    if not leave_out:
        return value, None
    fewer = (images - 1).clamp(min=1).double()
    # Without a negative image only N_j changes, and only for the positives j whose logit is not above that of the image.
    tail = _sums_from(hits / (fewer * images)) / positives
    change = torch.empty_like(falling)
    change.scatter_(1, order, tail.gather(1, _before(images, falling.shape[1])))
    # Without a positive image H_j changes, too, and one term of the mean is gone.
    before = torch.searchsorted(thresholds, thresholds)
    precision = (hits - 1) / fewer
    rest = (F.pad(sums, (1, 0)) + _sums_from(precision)).gather(1, before) - precision
    change.scatter_(1, order.gather(1, places), rest / max(positives - 1, 1) - value.unsqueeze(1))
    return value, change


def _sums_from(values: Tensor) -> Tensor:
    """Sum values [P, K] from each to the last: [P, K + 1], the last of them 0."""
    return F.pad(values.flip(1).cumsum(1).flip(1), (0, 1))


def _before(ends: Tensor, n: int) -> Tensor:
    """Return how many of the ends [P, K] lie at or before each of n ranks: int64 [P, n]."""
    passed = torch.zeros(len(ends), n + 1, dtype=torch.int64, device=ends.device)
    passed.scatter_add_(1, ends, torch.ones_like(ends))
    return passed[:, :-1].cumsum(1)
