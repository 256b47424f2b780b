"""Resampling images with replacement: intervals of a score, and the test of a difference."""

import math
from functools import lru_cache

import numpy as np
import torch

RESAMPLES = 200


@lru_cache(maxsize=4)
def resamples(images, count=RESAMPLES):
    """How often each image is in each sample of as many, drawn with replacement: uint8 [images, count].

    From a fixed seed, so that they are the same for all probes, and the first of many the same as of few.
    """
    random = np.random.default_rng(0)
    result = torch.empty(images, count, dtype=torch.uint8)
    for column in result.t():
        drawn = np.bincount(random.integers(images, size=images), minlength=images)
        column.copy_(torch.from_numpy(drawn.astype(np.uint8)))
    return result


def interval(scores):
    """Return (value, low, high) of scores [1 + R], the first of which is of the images as they are.

    low, high: the 2.5 and 97.5 percentiles of the others (Efron & Tibshirani 1993, section 13.3), NaN left out.
    """
    return intervals(scores.unsqueeze(0))[0]


def intervals(scores):
    """As interval(), for each row of scores [P, 1 + R]: a list."""
    ends = torch.nanquantile(scores[:, 1:], torch.tensor([0.025, 0.975], dtype=scores.dtype), dim=1)
    return [tuple(row) for row in torch.cat([scores[:, :1], ends.t()], dim=1).tolist()]


def paired_test(first, second):
    """Compare two probes by their scores [1 + R] on the same resamples.

    Returns (difference, low, high, p): the difference first - second with its percentile interval, and
    the two-sided p value of its being 0, by inverting that interval:
    p = min(1, 2 min(1 + #{d_r <= 0}, 1 + #{d_r >= 0}) / (R + 1)), d_r the difference in resample r
    (Efron & Tibshirani 1993, sections 13.3 and 15.4; the 1 as Davison & Hinkley 1997, section 4.2). No p
    value is below 2 / (R + 1). Resamples in which a score is undefined are left out.
    """
    difference = first - second
    value, low, high = interval(difference)
    drawn = difference[1:][~difference[1:].isnan()]
    if math.isnan(value) or not len(drawn):
        return value, low, high, torch.nan
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return value, low, high, min(1.0, 2 * (1 + tail) / (1 + len(drawn)))
