"""Maps as pixels: over the photograph, and with the boxes or the contours of objects."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

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
# Colour of a box's line, its width and that of its dark edges, in pixels of a picture of 224: of the class that is
# explained, and of other classes.
LINES = {True: ((150, 255, 40), 3, 1), False: ((255, 255, 255), 1, 1)}
EDGE = (20, 20, 20)
# Length of a dash, and of the gap after it, in the same pixels.
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

    A light line runs on each edge of a box and has a dark edge on both sides, so that it is visible on any colour: thick
    and green for the class explained, thin and white for others, dashed if the box is difficult.
    """
    pixels, side = pixels.copy(), len(pixels)
    weight = max(1, round(side / 224))
    # The class explained comes last, on top.
    for box in sorted(boxes, key=lambda box: box.explained):
        colour, light, dark = LINES[box.explained]
        light, dark, dash = weight * light, weight * dark, weight * DASH if box.difficult else side
        width = light + 2 * dark
        # The first pixel of each line. On the border of the picture, a line is wholly within it.
        lines = [min(max(round(side / size * edge - width / 2), 0), side - width) for edge in box.edges]
        _outline(pixels, lines, width, EDGE, dash)
        _outline(pixels, [line + dark for line in lines], light, colour, dash)
    return pixels


def with_contour(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the contour of a mask, bool [S, S], on a copy of square pixels uint8 [P, P, 3], in the lines of explained boxes."""
    pixels, side = pixels.copy(), len(pixels)
    enlarged = Image.fromarray(mask).convert("L").resize((side, side), Image.Resampling.NEAREST)
    reach = max(1, round(side / 224))
    for colour, width in ((EDGE, 2 * reach), (LINES[True][0], reach)):
        # The pixels within `width` of the border between the mask and the rest.
        outer, inner = (enlarged.filter(rank(2 * width + 1)) for rank in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        pixels[np.asarray(outer) != np.asarray(inner)] = colour
    return pixels


def _outline(pixels: np.ndarray, lines: Sequence[int], width: int, colour: Sequence[int], dash: int) -> None:
    """Draw two lines across and two down. lines: the first pixels of the left, the upper, the right and the lower one."""
    x0, y0, x1, y1 = lines
    drawn = (np.arange(len(pixels)) // dash) % 2 == 0
    across, down = drawn.copy(), drawn.copy()
    across[:x0], across[x1 + width :] = False, False
    down[:y0], down[y1 + width :] = False, False
    for y in (y0, y1):
        pixels[y : y + width, across] = colour
    for x in (x0, x1):
        pixels[down, x : x + width] = colour


def _ramp(strength: np.ndarray, colours: Sequence[Sequence[float]]) -> np.ndarray:
    """Go from the first colour, up to a strength of 0.5, to the second one at 1."""
    middle, end = map(np.asarray, colours)
    return middle + (end - middle) * np.clip(2 * strength - 1, 0, 1)


def _bytes(values: np.ndarray) -> np.ndarray:
    """Turn colours in 0..1 into bytes."""
    return (255 * np.clip(values, 0, 1)).round().astype(np.uint8)
