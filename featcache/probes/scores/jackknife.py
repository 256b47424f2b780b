"""The jackknife, which leaves out one image at a time: intervals of scores, and a test of their difference."""

import math

import torch
from torch import Tensor

# Two-sided 95% quantile of the standard normal distribution.
Z = 1.959963984540054
# Smaller deviations are rounding errors: no image changes the score.
NOTHING = 1e-12
# Number of groups of images that are left out in turn where a metric has no formula for leaving out one image.
GROUPS = 100
# The bounds of a fraction.
FRACTION = (0.0, 1.0)


def influences(scores: Tensor, left_out: Tensor) -> Tensor:
    """Return the influence of each image on a score: (n - 1) / n times the change when the image is left out.

    scores: float64 [...]. left_out: [..., n], the scores without image i. Returns [..., n], NaN where no score is left
    without the image. The sum of squares of the influences is the jackknife's estimate of the score's variance (Efron &
    Tibshirani 1993, chapter 11). For the mean of a variable it is exactly the variance of the mean.
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
    # Summed together, so that a single probe is summed in the same order as many.
    above, below = torch.stack([upper, lower]).sum(2)
    left_out = None
    if leave_out:
        left_out = (above.unsqueeze(1) - upper).div_((below.unsqueeze(1) - lower).clamp_(min=least))
    return above / below.clamp(min=least), left_out, below


def nan_for_zero(counts: Tensor) -> Tensor:
    """Return counts as float64 with NaN for 0, so that a score over no class is NaN, whatever the rounding."""
    return counts.double().masked_fill(counts == 0, torch.nan)


def without_each_group(images: int) -> list[Tensor]:
    """Return, for each of at most GROUPS groups of images, the mask of the images outside it: bool [images]."""
    groups = min(images, GROUPS)
    # Neighbours go to different groups because data sets are often sorted by class.
    group = torch.arange(images) % groups
    return [group != number for number in range(groups)]


def interval(values: Tensor, deviation: Tensor, count: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return (low, high), the 95% interval of scores that lie within bounds.

    It is fraction_interval for fractions, and values +- half_width, cut at the bounds, for other scores.
    """
    if bounds == FRACTION:
        return fraction_interval(values, deviation, count)
    half = half_width(deviation, count)
    return (values - half).clamp(min=bounds[0]), (values + half).clamp(max=bounds[1])


def fraction_interval(values: Tensor, deviation: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high), the 95% interval of scores v in [0, 1] with these standard deviations: tensors like values.

    This is Wilson's interval, with the number of trials m that gives the deviation: v (1 - v) / m = deviation^2 (Kott &
    Carr, Journal of Official Statistics 1997). For a share of images it is exactly Wilson's interval. It always
    contains v and stays within [0, 1]. Where no image changes the score, for example because all are right, m is
    `count`, float64 like values; where leaving out an image leaves no score, m is 1.
    """
    spread = values * (1 - values)
    trials = torch.where(deviation > NOTHING, spread / deviation.square(), count)
    trials = trials.masked_fill(deviation.isnan(), 1).clamp(min=1)
    centre = (values + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * (spread / trials + (Z / (2 * trials)).square()).sqrt()
    # Rounding could put an end on the wrong side of the value.
    return torch.minimum(centre - half, values).clamp(min=0), torch.maximum(centre + half, values).clamp(max=1)


def half_width(deviation: Tensor, count: Tensor) -> Tensor:
    """Return half the width of the 95% interval of unbounded scores: Z s / sqrt(1 - Z^2 / n).

    count: number n of images, float64. The interval contains all true scores v0 with
    |v - v0| / sqrt(s^2 + (v - v0)^2 / n) below 1.96; the denominator is the deviation under v0. It is NaN where n is
    too small.
    """
    return Z * deviation / (1 - Z**2 / count).sqrt()


def paired_test(first: tuple[float, Tensor], second: tuple[float, Tensor]) -> tuple[float, float, float, float]:
    """Compare two scores on the same images. first, second: (score, influences [n]).

    Returns (difference, low, high, p) for d = first - second. Let x_i be the difference of the influences of image i,
    and s^2 the sum of the x_i^2. Then p is the two-sided p value of z = d / sqrt(s^2 + d^2 / n), whose denominator is
    the deviation under a true difference of 0; for a share of images this is McNemar's test. low and high bound the
    differences that the same test does not reject at 0.05, see half_width.
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
