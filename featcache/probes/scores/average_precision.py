"""Average precision of many probes in many bootstrap resamples, from one sort a probe."""

import numpy as np
import torch
from torch.nn import functional as F

# Of the sums over bags that are computed at a time.
PIECE_BYTES = 64 << 20


@torch.no_grad()
def average_precision(scores, labels, weights=None):
    """Non-interpolated average precision of one class, as scikit-learn's average_precision_score.

    scores: [P, n]. labels: bool [n]. weights: float32 [n, R], how often each image is in each of R
    resamples, whole numbers. Returns float64 [P, 1 + R]: of the images as they are, then of the
    resamples ([P, 1] without). NaN where no image is positive. Images of equal score are one threshold.

    With w_i the weight of image i: the sum over thresholds t of h_t H_t / N_t, over the sum of the h_t;
    h_t sums w_i over the positives that score t, H_t and N_t over the positives and all images that
    score t or more.
    """
    positives = int(labels.sum())
    if not positives:
        columns = 1 if weights is None else 1 + weights.shape[1]
        return torch.full((len(scores), columns), torch.nan, dtype=torch.float64, device=scores.device)
    size = len(scores) if weights is None else max(PIECE_BYTES // (8 * positives * weights.shape[1]), 1)
    return torch.cat([_of_piece(piece, labels, weights, positives) for piece in scores.split(size)])


def _of_piece(scores, labels, weights, positives):
    falling = -scores
    order = _argsort(falling)  # [P, n]
    ranked = falling.gather(1, order)
    places = labels[order].nonzero()[:, 1].view(-1, positives)  # [P, K]: ranks of the positives
    # How many images, and how many positives, score as high as each positive.
    above = torch.searchsorted(ranked, ranked.gather(1, places), right=True)
    hits = torch.searchsorted(above, above, right=True)
    value = (hits.double() / above).mean(1, keepdim=True)
    if weights is None:
        return value
    # The images between one positive's threshold and the next: of equal positives the first has them all.
    images = _bags(order, above, weights)
    found = _bags(order.gather(1, places), hits, weights)
    total, right = images.new_zeros(2, len(scores), weights.shape[1])
    result = total.double()
    for k in range(positives):
        # Sums of whole numbers, exact in float32 up to 2^24. A resample may begin with images that it lacks.
        right += found[:, k]
        total += images[:, k]
        result += found[:, k] * right / total.clamp(min=1)
    return torch.cat([value, result / right], dim=1)


def _bags(order, ends, weights):
    """Sum weights [n, R] of the images order[p, ends[p, k - 1] : ends[p, k]]: [P, K, R]."""
    # The images behind the last end make a bag that nobody asks for.
    starts = F.pad(ends, (1, 0)) + order.shape[1] * torch.arange(len(order), device=order.device).unsqueeze(1)
    sums = F.embedding_bag(order.flatten(), weights, starts.flatten(), mode="sum")
    return sums.view(*starts.shape, -1)[:, :-1]


def _argsort(values):
    # numpy's sort is several times faster than torch's on a CPU; the order of equals does not matter here.
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=1))
    return values.argsort(dim=1)
