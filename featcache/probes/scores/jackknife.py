"""Leaving out one image at a time: intervals of a score, and the test of a difference."""

import math

import torch

from featcache.probes.scores.metrics import UNBOUNDED

# Of the standard normal distribution, two-sided 95%.
Z = 1.959963984540054
# Deviations below are rounding: the score does not change with any image.
NOTHING = 1e-12


def influences(scores, left_out):
    """How much each image adds to a score: (n - 1) / n times the change when it is left out.

    scores: float64 [...]. left_out: [..., n], the scores without image i. Returns [..., n]. Their sum of squares is
    the jackknife's estimate of the score's variance (Efron & Tibshirani 1993, chapter 11); for the mean of a
    variable it is exactly the variance of the mean. NaN where nothing is left without an image.
    """
    n = left_out.shape[-1]
    return (scores.unsqueeze(-1) - left_out) * ((n - 1) / n)


def deviations(influence):
    """Standard deviations [...] of scores, of the influences [..., n] of their images."""
    return influence.square().sum(-1).sqrt()


def fraction_interval(values, deviation, count):
    """Return (low, high), the 95% interval of scores in [0, 1] by their standard deviations: tensors like values.

    Wilson's interval with as many trials m as would give that deviation, v (1 - v) / m = deviation^2
    (Kott & Carr, Journal of Official Statistics 1997), which for a share of images is Wilson's own. It
    always holds the value, and never leaves [0, 1]. Where no image changes the score, as when all is right,
    m is `count`, float64 like values; where nothing is left without some image, it is 1.
    """
    spread = values * (1 - values)
    trials = torch.where(deviation > NOTHING, spread / deviation.square(), count)
    trials = trials.masked_fill(deviation.isnan(), 1).clamp(min=1)
    centre = (values + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * (spread / trials + (Z / (2 * trials)).square()).sqrt()
    # Of rounding alone an end could lie beyond the value.
    return torch.minimum(centre - half, values).clamp(min=0), torch.maximum(centre + half, values).clamp(max=1)


def interval(metric, values, deviation, count):
    """Return (low, high), the 95% interval of a metric's scores: fraction_interval, or of nll v +- half_width, cut at 0."""
    if metric in UNBOUNDED:
        half = half_width(deviation, count)
        return (values - half).clamp(min=0), values + half
    return fraction_interval(values, deviation, count)


def half_width(deviation, count):
    """Half the 95% interval of scores that may be any number, of float64 `count` images: Z s / sqrt(1 - Z^2 / n).

    It holds the truths v0 for which z = (v - v0) / sqrt(s^2 + (v - v0)^2 / n) is within 1.96; the denominator is
    the deviation if v0 is true. NaN where there are too few images to tell.
    """
    return Z * deviation / (1 - Z**2 / count).sqrt()


def paired_test(first, second):
    """Compare two scores on the same images. first, second: (score, influences [n]).

    Returns (difference, low, high, p) of d = first - second. With x_i the difference of the influences of
    image i and s^2 the sum of their squares, p is two-sided of z = d / sqrt(s^2 + d^2 / n), whose
    denominator is the deviation if the true difference is 0; for a share of images that is McNemar's test.
    low and high are the differences that the same test does not reject at 0.05, see half_width.
    """
    (a, x), (b, y) = first, second
    difference, n = a - b, len(x)
    if math.isnan(difference):
        return difference, math.nan, math.nan, math.nan
    s = deviations(x - y)
    if difference == 0 and not s > NOTHING:
        return difference, difference, difference, 1.0
    half = half_width(s, s.new_tensor(n)).item()
    z = (abs(difference) / (s.square() + difference**2 / n).sqrt()).item() if s >= 0 and n > 1 else 0.0
    return difference, difference - half, difference + half, math.erfc(z / math.sqrt(2))
