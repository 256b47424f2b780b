"""Ranges, which a field of a grid may have in place of a value, and the draws of random search.

log, linspace and choice stand for all their values. In a group with `random`, choice is drawn from, as are uniform and
loguniform, which are allowed only there.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from featcache.errors import shown

DRAWN = ("uniform", "loguniform", "choice")
RANGES = ("log", "linspace", *DRAWN)
MOST_POINTS = 10_000


@dataclass(frozen=True)
class Draw:
    """Draw `number` of a random search: the same on every machine, whatever else the group draws."""

    seed: int
    number: int

    def fraction(self, field: str) -> float:
        """Return a number in [0, 1) that depends only on the seed, the draw and the name of the field."""
        digest = hashlib.sha256(f"{self.seed}/{self.number}/{field}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def is_range(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a field's value is a range."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in RANGES


def draws_from(value: object) -> bool:
    """Return whether a field's value, or anything in it, is a range that random search draws from."""
    if is_range(value) and next(iter(value)) in DRAWN:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(draws_from, parts))


def spread(value: Mapping[str, Any], integer: bool) -> list[float]:
    """Return the values of {log: [lo, hi, n]} or {linspace: [lo, hi, n]}: both ends included, to 6 digits.

    integer: round to whole numbers, each once. Raises ValueError, which says what is expected.
    """
    name, given = next(iter(value.items()))
    low, high, count = _numbers(given, 3, f"{name}: expected [lowest, highest, how many]")
    if count != int(count) or not 2 <= count <= MOST_POINTS:
        raise ValueError(f"{name}: how many must be a whole number from 2 to {MOST_POINTS}, not {shown(given[2])}")
    if name == "log" and (low <= 0 or high <= 0):
        raise ValueError("log: expected [lowest, highest, how many], with lowest and highest above 0")
    _check_width(name, given, low, high)
    shares = [i / (count - 1) for i in range(int(count))]
    points = [low * (high / low) ** s if name == "log" else low + (high - low) * s for s in shares]
    return list(dict.fromkeys(_rounded(point, integer) for point in points))


def ends(value: Mapping[str, Any]) -> tuple[float, float]:
    """Return (lowest, highest) of {uniform: [lo, hi]} or {loguniform: [lo, hi]}. Raises ValueError."""
    name, given = next(iter(value.items()))
    low, high = _numbers(given, 2, f"{name}: expected [lowest, highest]")
    if low > high or (name == "loguniform" and low <= 0):
        raise ValueError(f"{name}: {shown(given)} is not [lowest, highest]{', above 0' * (name == 'loguniform')}")
    _check_width(name, given, low, high)
    return low, high


def drawn(value: Mapping[str, Any], field: str, integer: bool, draw: Draw) -> float:
    """Return the value that a draw takes from {uniform: ...} or {loguniform: ...}, to 6 digits. Raises ValueError."""
    low, high = ends(value)
    share = draw.fraction(field)
    if "loguniform" in value:
        number = low * (high / low) ** share
    else:
        # Each whole number is equally likely, including both ends.
        number = math.floor(low + share * (high - low + 1)) if integer else low + share * (high - low)
    return min(max(_rounded(number, integer), low), high)


def choices(value: Mapping[str, Any], field: str, draw: Draw | None) -> list[tuple[int, Any]]:
    """Return [(number, item)] of {choice: [...]}: all items, or the one that a draw takes. Raises ValueError."""
    name, items = next(iter(value.items()))
    if not isinstance(items, list) or not items:
        raise ValueError(f"{name}: expected a list of values")
    numbered = list(enumerate(items))
    return [numbered[int(draw.fraction(field) * len(items))]] if draw else numbered


def _check_width(name: str, given: Any, low: float, high: float) -> None:
    if not math.isfinite(high / low if name.startswith("log") else high - low):
        raise ValueError(f"{name}: {shown(given)} is wider than numbers go")


def _numbers(given: Any, count: int, expected: str) -> list[float]:
    """Return a list of `count` finite numbers. Raises ValueError, which begins with `expected`."""
    try:
        if not isinstance(given, list) or len(given) != count or any(isinstance(v, bool) for v in given):
            raise ValueError
        numbers = [float(v) for v in given]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{expected}, not {shown(given)}") from None
    return numbers


def _rounded(number: float, integer: bool) -> float:
    return round(number) if integer else float(f"{number:.6g}")
