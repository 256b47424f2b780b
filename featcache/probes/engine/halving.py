"""Successive halving: at which epochs probes are compared."""

import math

from featcache.probes.grids.search import Halving


def rung_epoch(epochs: int, fraction: float) -> int:
    """Return the epoch at which probes of that many epochs are compared."""
    # In floats, 3 * 0.1 is a little more than 0.3, and must not be rounded up to the next epoch.
    return max(math.ceil(epochs * fraction - 1e-9), 1)


def rungs(search: Halving | None) -> list[float]:
    """Return the fractions of training at which a search compares: first, first * factor, ... below 1."""
    fractions, fraction = [], search.first if search else 1.0
    while search and fraction < 1 - 1e-9:
        fractions.append(fraction)
        fraction *= search.factor
    return fractions
