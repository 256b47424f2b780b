"""Scores of many probes at once: logits [P, N, C] in, one value per probe out. All are fractions of 1."""

import numpy as np
import torch

RESAMPLES = 200


def average_precision(scores, labels, weights=None):
    """Non-interpolated average precision of one class, as scikit-learn's average_precision_score.

    scores: [P, n]. labels: bool [n]. weights: [R, n] multiplicities of the images in R bootstrap
    resamples, or None. Returns float64 [P], or [P, R]; NaN where no image is positive. Images of
    equal score count as one threshold.
    """
    order = scores.argsort(dim=1, descending=True)
    ranked = scores.gather(1, order)
    ends = _threshold_ends(ranked)  # [P, n]: last place with the same score
    one = torch.ones(1, labels.shape[0], dtype=torch.float64)
    weights = one if weights is None else weights.double()
    result = torch.empty(len(scores), len(weights), dtype=torch.float64)
    for p in range(len(scores)):
        counts = weights[:, order[p]]  # [R, n]
        hits = counts * labels[order[p]]
        precision = (hits.cumsum(1) / counts.cumsum(1).clamp(min=1))[:, ends[p]]
        result[p] = (hits * precision).sum(1) / hits.sum(1)
    return result.squeeze(1) if weights is one else result


def _threshold_ends(ranked):
    n = ranked.shape[1]
    places = torch.arange(n).expand_as(ranked)
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    # The nearest end at or after each place: a running minimum from the right.
    return torch.where(last, places, n).flip(1).cummin(1).values.flip(1)


def mean_average_precision(logits, labels, weights=None):
    """Mean over classes of average_precision, images with label -1 dropped class by class.

    logits: [P, N, C]. labels: int8 [N, C]. Classes without a positive image are left out of the mean.
    Returns float64 [P] (or [P, R], see average_precision).
    """
    values = []
    for c in range(labels.shape[1]):
        known = labels[:, c] >= 0
        if (labels[:, c] == 1).any():
            part = None if weights is None else weights[:, known]
            values.append(average_precision(logits[:, known, c], labels[known, c] == 1, part))
    if not values:
        return torch.full((len(logits),) if weights is None else (len(logits), len(weights)), torch.nan)
    return torch.stack(values).nanmean(0)


def top_k(logits, labels, k, weights=None):
    """Share of images whose class is among the k largest logits. labels: int64 [N]. Returns as above."""
    k = min(k, logits.shape[2])
    hits = (logits.topk(k, dim=2).indices == labels[None, :, None]).any(2).double()  # [P, N]
    return hits.mean(1) if weights is None else hits @ weights.double().t() / weights.shape[1]


METRICS = {
    "map": mean_average_precision,
    "top1": lambda logits, labels, weights=None: top_k(logits, labels, 1, weights),
    "top5": lambda logits, labels, weights=None: top_k(logits, labels, 5, weights),
}
TASK_METRICS = {"multi-label": ("map",), "single-label": ("top1", "top5")}


def score(metric, logits, labels):
    """Return [(value, low, high)] per probe: the score and its bootstrap 95% interval over images.

    The interval is the 2.5 and 97.5 percentile of 200 resamples, the same for all probes. A probe
    with a logit that is not finite scores NaN.
    """
    n = logits.shape[1]
    weights = torch.from_numpy(np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES))
    values = METRICS[metric](logits, labels)
    spread = torch.nanquantile(METRICS[metric](logits, labels, weights), torch.tensor([0.025, 0.975]).double(), dim=1)
    broken = ~torch.isfinite(logits).flatten(1).all(1)
    table = torch.stack([values, *spread], dim=1).masked_fill(broken.unsqueeze(1), torch.nan)
    return [tuple(row) for row in table.tolist()]


def chance(metric, labels, classes):
    """Expected score of a random ranking.

    top-k: k / C. map: the mean over classes of (H + (n - H) (R - 1) / (n - 1)) / n with n images, R of
    them positive, and H the n-th harmonic number (Bestgen 2015, "Exact expected average precision of
    the random baseline"); on few images that is well above the share of positives R / n.
    """
    if metric != "map":
        return min(int(metric.removeprefix("top")) / classes, 1.0)
    expected = []
    for column in labels.t():
        n, positives = int((column >= 0).sum()), int((column == 1).sum())
        if positives:
            harmonic = sum(1 / i for i in range(1, n + 1))
            expected.append((harmonic + (n - harmonic) * (positives - 1) / max(n - 1, 1)) / n)
    return sum(expected) / len(expected) if expected else float("nan")
