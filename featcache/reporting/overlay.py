"""Maps as pixels: over the photograph, and with the boxes of objects."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

# Values of this quantile of a map's absolute values, and larger ones, have the strongest colour: with the maximum as the
# peak, one bright pixel would leave the rest dark.
PEAK = 0.995
# What of a photograph's brightness is left under a map, so that strong colours are the brightest; the grey (0 to 1) where
# there is no photograph.
DIM, BARE = 0.5, 0.2
# Orange speaks for the class and blue against it, which people with any colour vision tell apart. The brighter, the
# stronger: each as (half as strong as the peak, at the peak), in red, green and blue.
FOR = ((0.84, 0.37, 0.0), (1.0, 0.88, 0.45))
AGAINST = ((0.0, 0.45, 0.74), (0.6, 0.88, 1.0))
# Widths of a box's white line and of its dark edge, in pixels: of the class that is explained, and of other classes.
LINES = {True: (4, 1), False: (2, 1)}
# Length of a dash, and of the gap after it, in pixels.
DASH = 4


class Box(NamedTuple):
    """A box in pixels of a map: its edges x0, y0, x1, y1; whether its class is the one explained; whether it is difficult."""

    edges: Sequence[float]
    explained: bool
    difficult: bool


def overlay(values: np.ndarray, picture: np.ndarray | None = None) -> np.ndarray:
    """Lay a map [S, S] over its photograph uint8 [S, S, 3], which is made grey and dark: uint8 [S, S, 3].

    Every map has a scale of its own, the same for positive and negative values; see PEAK.
    """
    strength = np.abs(values).astype(np.float64)
    strength = np.clip(strength / (np.quantile(strength, PEAK) or strength.max() or 1), 0, 1)[..., None]
    base = np.full_like(strength, BARE) if picture is None else DIM * picture.mean(2, keepdims=True) / 255
    colour = np.where(values[..., None] > 0, _ramp(strength, FOR), _ramp(strength, AGAINST))
    share = np.minimum(1.9 * strength, 0.95 + 0.05 * strength)
    return _bytes((1 - share) * base + share * colour)


def key(width: int, height: int) -> np.ndarray:
    """Return the colours from the strongest negative value to the strongest positive one: uint8 [height, width, 3]."""
    # No quantile of it is below the maximum, as one would be in overlay().
    values = np.linspace(-1 / PEAK, 1 / PEAK, width)[None].repeat(height, 0)
    return overlay(values)


def on_white(colours: np.ndarray) -> np.ndarray:
    """Lay colours with opacity, uint8 [S, S, 4], on white: uint8 [S, S, 3]."""
    values = colours.astype(np.float64) / 255
    return _bytes(values[..., :3] * values[..., 3:] + 1 - values[..., 3:])


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize square pixels uint8 [S, S, 3] to `side`: larger pixels stay squares."""
    if len(pixels) == side:
        return pixels
    rule = Image.Resampling.NEAREST if len(pixels) < side else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(pixels).resize((side, side), rule))


def with_boxes(pixels: np.ndarray, boxes: Sequence[Box], size: int) -> np.ndarray:
    """Draw boxes on a copy of square pixels uint8 [P, P, 3] of a map that is `size` pixels wide.

    A white line runs on each edge of a box and has a dark edge on both sides, so that it is visible on any colour: thick
    for the class explained, thin for others, dashed if the box is difficult.
    """
    pixels, scale = pixels.copy(), len(pixels) / size
    # The class explained comes last, on top.
    for box in sorted(boxes, key=lambda box: box.explained):
        white, dark = LINES[box.explained]
        for width, colour in ((white + 2 * dark, 20), (white, 255)):
            _rectangle(pixels, [scale * edge for edge in box.edges], width, colour, box.difficult)
    return pixels


def _rectangle(pixels: np.ndarray, edges: Sequence[float], width: int, grey: int, dashed: bool) -> None:
    """Draw the outline of a rectangle, whose lines have their middle on its edges, and are inside the picture."""
    side, positions = len(pixels), np.arange(len(pixels))
    # Of each edge, the first pixel of its line. A line on the border of the picture is wholly within it.
    x0, y0, x1, y1 = (min(max(round(edge - width / 2), 0), side - width) for edge in edges)
    drawn = (positions // DASH) % 2 == 0 if dashed else np.ones(side, bool)
    across, down = drawn.copy(), drawn.copy()
    across[:x0], across[x1 + width :] = False, False
    down[:y0], down[y1 + width :] = False, False
    for y in (y0, y1):
        pixels[y : y + width, across] = grey
    for x in (x0, x1):
        pixels[down, x : x + width] = grey


def _ramp(strength: np.ndarray, colours: Sequence[Sequence[float]]) -> np.ndarray:
    """Go from the first colour, up to a strength of 0.5, to the second one at 1."""
    middle, end = map(np.asarray, colours)
    return middle + (end - middle) * np.clip(2 * strength - 1, 0, 1)


def _bytes(values: np.ndarray) -> np.ndarray:
    """Turn colours in 0..1 into bytes."""
    return (255 * np.clip(values, 0, 1)).round().astype(np.uint8)
