"""Sheets: an image and a class, and the maps of every probe (rows) and method (columns) side by side."""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featcache.attribution.results import IDENTITY
from featcache.errors import without_middle
from featcache.probes.runs.run import Run
from featcache.reporting.configuration import labels
from featcache.reporting.localisation import MAPS, Localisation, explained
from featcache.reporting.overlay import Box, on_white, overlay, resized, with_boxes, with_contour

BOX_ARRAYS = ("box_examples", "boxes", "box_classes", "box_difficult")
# What stands behind a method's name above its colours, which are a column of their own.
COLOURS = "colours"
# Longer ids, such as those of grids, lose their middle in titles.
LONGEST_ID = 64


@dataclass(frozen=True, eq=False)
class Panel:
    """A map as a picture: its pixels, uint8 [S, S, 3], without boxes, and its scores, a line for each."""

    pixels: np.ndarray
    caption: str


@dataclass(frozen=True, eq=False)
class Sheet:
    """What is drawn of an image and a class.

    picture: the photograph as the backbone sees it, uint8 [S, S, 3], or None where attribute was given no images. mask: bool
    [S, S], the pixels of the class's objects where maps are scored on masks, else None. reason: why the image was
    chosen, or "". probes: {id: name, and what the probe says of the class}. methods: names. panels: by probe and method.
    """

    id: str
    label: str
    reason: str
    picture: np.ndarray | None
    boxes: Sequence[Box]
    mask: np.ndarray | None
    probes: Mapping[str, str]
    methods: Sequence[str]
    panels: Mapping[tuple[str, str], Panel]

    @property
    def size(self) -> int:
        """The side of its maps, in pixels."""
        return len(next(iter(self.panels.values())).pixels)

    @property
    def coloured(self) -> bool:
        """Whether it has columns of colours."""
        return any(method.endswith(f" {COLOURS}") for method in self.methods)

    def framed(self, pixels: np.ndarray, side: int) -> np.ndarray:
        """Resize a panel's pixels or the photograph to `side`, and draw the boxes: uint8 [side, side, 3].

        The objects of a mask have its contour in the place of their boxes.
        """
        pixels = resized(pixels, side)
        if self.mask is None:
            return with_boxes(pixels, self.boxes, self.size)
        others = [box for box in self.boxes if box.difficult or not box.explained]
        return with_contour(with_boxes(pixels, others, self.size), self.mask)

    @property
    def title(self) -> str:
        """The image, and the class explained."""
        return f"{without_middle(self.id, LONGEST_ID)}: {self.label}"


def read_sheets(run: Run, localisation: Localisation) -> list[Sheet]:
    """Make the sheets of the maps that attribute kept, without those of probes that the run does not have any more.

    Returns an empty list where there are none. Raises BadInput for damage.
    """
    if not explained(run, MAPS):
        return []
    data = io.BytesIO(run.read(MAPS))
    try:
        with np.load(data, allow_pickle=False) as kept:
            return _sheets(run, dict(kept), localisation)
    except (zipfile.BadZipFile, zlib.error, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise run.damaged(MAPS, error) from None


def _sheets(run: Run, kept: Mapping[str, np.ndarray], localisation: Localisation) -> list[Sheet]:
    """Make the sheets of the contents of attribution.npz. Raises LookupError if `localisation` lacks one of the maps."""
    present = {row["probe"] for row in run.scores}
    groups: dict[tuple[str, str], list[int]] = {}
    for number, texts in enumerate(kept["panels"]):
        identity = dict(zip(IDENTITY, map(str, texts), strict=False))
        if identity["probe"] in present:
            groups.setdefault((identity["id"], identity["class"]), []).append(number)
    names = labels(run, list(dict.fromkeys(str(texts[0]) for texts in kept["panels"] if str(texts[0]) in present)))
    return [_sheet(key, numbers, kept, names, localisation) for key, numbers in groups.items()]


def _sheet(
    key: tuple[str, str],
    numbers: Sequence[int],
    kept: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    localisation: Localisation,
) -> Sheet:
    """Make the sheet of an image's id and a class. numbers: of their maps."""
    at = list(kept["ids"]).index(key[0])
    picture = kept["images"][at] if "images" in kept else None
    coloured = {int(number): n for n, number in enumerate(kept.get("coloured", ()))}
    probes, panels = dict[str, str](), dict[tuple[str, str], Panel]()
    for number in numbers:
        texts = kept["panels"][number]
        probe, method = str(texts[0]), str(texts[1])
        # The first map of a probe is not that of a random head in its place.
        probes.setdefault(probe, names[probe] + _prediction(kept, number))
        panels[probe, method] = Panel(overlay(kept["maps"][number], picture), localisation.caption(texts))
        if number in coloured:
            panels[probe, f"{method} {COLOURS}"] = Panel(on_white(kept["colours"][coloured[number]]), "")
    methods = list(dict.fromkeys(method for _, method in panels))
    reason = str(kept["reasons"][numbers[0]]) if "reasons" in kept else ""
    mask = kept["masks"][numbers[0] % len(kept["masks"])] if "masks" in kept else None
    return Sheet(*key, reason, picture, _boxes(kept, at, key[1]), mask, probes, methods, panels)


def _prediction(kept: Mapping[str, np.ndarray], number: int) -> str:
    """Say the logit and the probability of a map's class, where they are known."""
    if "logits" not in kept or math.isnan(kept["logits"][number]):
        return ""
    return f": logit {kept['logits'][number]:.3g}, probability {100 * kept['probabilities'][number]:.0f}%"


def _boxes(kept: Mapping[str, np.ndarray], number: int, label: str) -> list[Box]:
    """Return the boxes of an image by its number. label: the class that is explained."""
    return [
        Box(edges, str(name) == label, bool(difficult))
        for at, edges, name, difficult in zip(*(kept[name] for name in BOX_ARRAYS), strict=True)
        if at == number
    ]
