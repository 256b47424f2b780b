"""Leaving out one image at a time: intervals of scores, and the test of a difference between two."""

import math

import torch
from torch import Tensor

# Of the standard normal distribution, two-sided 95%.
Z = 1.959963984540054
# A smaller deviation is rounding: the score does not change with any image.
NOTHING = 1e-12
# Scores without a formula for one image less are computed anew without each of so many groups of images.
GROUPS = 100
# The bounds of a fraction.
FRACTION = (0.0, 1.0)


def influences(scores: Tensor, left_out: Tensor) -> Tensor:
    """Return how much each image adds to a score: (n - 1) / n times the change when it is left out.

    scores: float64 [...]. left_out: [..., n], the scores without image i. Returns [..., n]. Their sum of squares is
    the jackknife's estimate of the score's variance (Efron & Tibshirani 1993, chapter 11), which for the mean of a
    variable is exactly the variance of the mean. They are NaN where nothing is left without an image.
    """
    n = left_out.shape[-1]
    return (scores.unsqueeze(-1) - left_out) * ((n - 1) / n)


def deviations(influence: Tensor) -> Tensor:
    """Return the standard deviations [...] of scores from the influences [..., n] of their images."""
    return influence.square().sum(-1).sqrt()


def ratio(upper: Tensor, lower: Tensor, leave_out: bool, least: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide the sums of upper by the sums of lower, both float64 [p, n].

    least: 1 where lower sums whole numbers, which turns 0 / 0 into 0. Returns the ratio over all images [p], the
    ratios without each of them [p, n] (None unless leave_out), and the sums of lower [p].
    """
    # Both at once, so that a lone probe is summed in the same order as many are.
    above, below = torch.stack([upper, lower]).sum(2)
    left_out = None
    if leave_out:
        left_out = (above.unsqueeze(1) - upper).div_((below.unsqueeze(1) - lower).clamp_(min=least))
    return above / below.clamp(min=least), left_out, below


def nan_for_zero(counts: Tensor) -> Tensor:
    """Return counts as float64 with NaN for 0: a score over no class must not come from rounding."""
    return counts.double().masked_fill(counts == 0, torch.nan)


def without_each_group(images: int) -> list[Tensor]:
    """Return, for each of at most GROUPS groups of images, the numbers of the images outside it: bool masks [images]."""
    groups = min(images, GROUPS)
    # Neighbours go to different groups: data sets are often sorted by class.
    group = torch.arange(images) % groups
    return [group != number for number in range(groups)]


def interval(values: Tensor, deviation: Tensor, count: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return (low, high), the 95% interval of scores that lie within bounds.

    Fractions have fraction_interval; other scores have values +- half_width, cut at the bounds.
    """
    if bounds == FRACTION:
        return fraction_interval(values, deviation, count)
    half = half_width(deviation, count)
    return (values - half).clamp(min=bounds[0]), (values + half).clamp(max=bounds[1])


def fraction_interval(values: Tensor, deviation: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high), the 95% interval of scores in [0, 1] by their standard deviations: tensors like values.

    This is Wilson's interval with as many trials m as would give that deviation, v (1 - v) / m = deviation^2
    (Kott & Carr, Journal of Official Statistics 1997); for a share of images it is Wilson's own. It
    always holds the value, and never leaves [0, 1]. Where no image changes the score, as when all is right,
    m is `count`, float64 like values; where nothing is left without some image, m is 1.
    """
    spread = values * (1 - values)
    trials = torch.where(deviation > NOTHING, spread / deviation.square(), count)
    trials = trials.masked_fill(deviation.isnan(), 1).clamp(min=1)
    centre = (values + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * (spread / trials + (Z / (2 * trials)).square()).sqrt()
    # Rounding alone could put an end on the wrong side of the value.
    return torch.minimum(centre - half, values).clamp(min=0), torch.maximum(centre + half, values).clamp(max=1)


def half_width(deviation: Tensor, count: Tensor) -> Tensor:
    """Return half the 95% interval of scores that may be any number, of float64 `count` images: Z s / sqrt(1 - Z^2 / n).

    The interval holds the truths v0 for which z = (v - v0) / sqrt(s^2 + (v - v0)^2 / n) is within 1.96; the
    denominator is the deviation if v0 is true. NaN where there are too few images to tell.
    """
    return Z * deviation / (1 - Z**2 / count).sqrt()


def paired_test(first: tuple[float, Tensor], second: tuple[float, Tensor]) -> tuple[float, float, float, float]:
    """Compare two scores on the same images. first, second: (score, influences [n]).

    Returns (difference, low, high, p) of d = first - second. With x_i the difference of the influences of
    image i and s^2 the sum of their squares, p is two-sided of z = d / sqrt(s^2 + d^2 / n), whose
    denominator is the deviation if the true difference is 0; for a share of images that is McNemar's test.
    low and high are the ends of the differences that the same test does not reject at 0.05, see half_width.
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
