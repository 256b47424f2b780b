"""Sheets as the report's page holds them: pictures inside, few enough bytes, and a text beside each."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from featcache.reporting.overlay import key
from featcache.reporting.sheets import Sheet

# Characters that the sheets of a page may take in all, and what a pixel takes about.
PAGE_BYTES, PER_PIXEL = 6_000_000, 0.8
# Sides of a map in pixels, of which the largest is taken that leaves room for all.
SIDES = (224, 160, 112)
# How wide a map is shown, at most: there is more to see in a grid of images, which is larger than this.
WIDTH, WIDE, GRID = 160, 224, 300


@dataclass(frozen=True)
class Shown:
    """A picture of a page. url: with its data inside. alt: what it shows, for those who do not see it."""

    url: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class PageSheet:
    """A Sheet whose pictures are text. rows: (name of a probe, a picture or None for each method). width: of a picture on the page."""

    title: str
    reason: str
    width: int
    photograph: Shown | None
    methods: Sequence[str]
    coloured: bool
    rows: Sequence[tuple[str, Sequence[Shown | None]]]

    @property
    def length(self) -> int:
        """The characters of its pictures."""
        shown = [self.photograph, *(each for _, row in self.rows for each in row)]
        return sum(len(each.url) for each in shown if each)


def embedded(sheets: Sequence[Sequence[Sheet]]) -> list[tuple[list[PageSheet], int]]:
    """Make the sheets of each run for a page, as many as PAGE_BYTES allow: (sheets, how many are left out) of each run.

    Every run has its share of the space, and what others leave of theirs.
    """
    panels = sum(1 + len(sheet.panels) for own in sheets for sheet in own)
    side = next((side for side in SIDES if panels * PER_PIXEL * side**2 <= PAGE_BYTES), SIDES[-1])
    made, left = list[tuple[list[PageSheet], int]](), PAGE_BYTES
    # Those that need least come first, so that what they leave is known.
    for number in sorted(range(len(sheets)), key=lambda number: len(sheets[number])):
        share, own = left // (len(sheets) - len(made)), list[PageSheet]()
        for sheet in sheets[number]:
            drawn = _embed(sheet, side)
            if drawn.length > share:
                break
            own.append(drawn)
            share, left = share - drawn.length, left - drawn.length
        made.append((own, len(sheets[number]) - len(own)))
    order = sorted(range(len(sheets)), key=lambda number: len(sheets[number]))
    return [made[order.index(number)] for number in range(len(sheets))]


def embedded_key() -> str:
    """Return the key of the colours as a data URL."""
    return _data_url(key(180, 12))


def _embed(sheet: Sheet, side: int) -> PageSheet:
    side = min(side, max(sheet.size, SIDES[-1]))

    def shown(pixels: np.ndarray, alt: str, caption: str = "") -> Shown:
        return Shown(_data_url(sheet.framed(pixels, side)), alt, caption)

    about = f"class {sheet.label} in image {sheet.id}"
    rows = list[tuple[str, list[Shown | None]]]()
    for probe, name in sheet.probes.items():
        row = list[Shown | None]()
        for method in sheet.methods:
            panel = sheet.panels.get((probe, method))
            alt = f"{method} of {name}, for {about}; {panel.caption}" if panel else ""
            row.append(shown(panel.pixels, alt, panel.caption) if panel else None)
        rows.append((name, row))
    picture = sheet.picture
    photograph = (
        None
        if picture is None
        else shown(picture, f"image {sheet.id}, with {'boxes' if sheet.mask is None else 'contours'} of {sheet.label}")
    )
    width = min(side, WIDE if sheet.size > GRID else WIDTH)
    return PageSheet(sheet.title, sheet.reason, width, photograph, sheet.methods, sheet.coloured, rows)


def _data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    # All of the colour is kept: maps are made of single coloured pixels, and boxes of thin lines.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
