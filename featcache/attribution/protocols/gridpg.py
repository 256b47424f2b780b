"""Grids of images of different classes (Boehle et al., CVPR 2021): the grid pointing game."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from featcache.attribution.batch import Boxed, Network, Source
from featcache.attribution.explained import Explained
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.reading import read_images
from featcache.attribution.targets import Target
from featcache.errors import BadInput


class GridPG(Protocol):
    """Images of different classes lie side by side in a grid; every class is explained, and its cell is its box.

    Classes and images are drawn from a seed. Without `confidence` they do not depend on the probes, so that all runs see
    the same grids; with it they are the same for all probes of one call. The features of grids are not in the store:
    all methods run the backbone.
    """

    type: Literal["gridpg"] = "gridpg"
    region: ClassVar[str] = "boxes"
    side: Annotated[int, Field(ge=2, le=10)] = Field(3, description="images along a side")
    grids: Annotated[int, Field(ge=1, le=1_000_000)] = Field(500, description="how many grids")
    seed: int = Field(0, description="draws classes and images")
    confidence: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="only images that every explained probe gets right, with at least this probability"
    )

    def pose(
        self, source: Source, limit: int | None, explained: Sequence[Explained]
    ) -> tuple[Source, Sequence[Target]]:
        """See Protocol.pose. Raises BadInput for multi-label data, for too few classes, and without a backbone."""
        split = source.split
        if source.network is None:
            raise BadInput(f"--protocol {self.type} runs the backbone: give --backbone, --dataset and --root")
        if split.labels.ndim != 1:
            raise BadInput(
                f"--protocol {self.type} needs images of one class each, and store {split.store.path} is multi-label; "
                "take --protocol boxes"
            )
        rows = self._rows(source, explained)
        chance, grids, targets = random.Random(self.seed), list[tuple[int, ...]](), list[Target]()
        cells = _cells(self.side, source.preprocessing.size)
        for number in range(min(self.grids, limit or self.grids)):
            classes = chance.sample(sorted(rows), self.side**2)
            grids.append(tuple(chance.choice(rows[label]) for label in classes))
            targets += [Target(number, label, cell) for label, cell in zip(classes, cells, strict=True)]
        laid_out = _laid_out(source, self.side, grids, self.picture(source.network))
        return replace(laid_out, images=sum(map(len, rows.values())), classes=len(rows)), targets

    def usable(self, source: Source, explained: Sequence[Explained]) -> np.ndarray:
        """Return which images of the split may be in a grid, bool [N]."""
        usable = np.ones(len(source.split), bool)
        if self.confidence is not None:
            # Heads with random weights, of a sanity check, have no say.
            for one in (one for one in explained if not one.note):
                confidence = one.confidence(source.split, source.device)
                usable &= (confidence >= self.confidence) & (confidence > 0)
        return usable

    def picture(self, network: Network) -> Callable[[int], torch.Tensor]:
        """Return the function from a row of the split to the picture in a cell, uint8 [3, S, S]."""
        return network.picture

    def _rows(self, source: Source, explained: Sequence[Explained]) -> dict[int, list[int]]:
        """Return {class: rows of images that may be in a grid}. Raises BadInput if there are too few classes."""
        split = source.split
        usable = self.usable(source, explained)
        rows = {
            int(label): np.flatnonzero(usable & (split.labels == label)).tolist() for label in np.unique(split.labels)
        }
        rows = {label: own for label, own in rows.items() if own}
        if len(rows) < self.side**2:
            chosen, remedy = "", "take a smaller side"
            if not usable.all():
                chosen = f" that every explained probe is sure of ({usable.sum()} of {len(usable)} images)"
                remedy = "take a smaller side, a lower confidence, or other probes"
            raise BadInput(
                f"--protocol {self.type}: a grid of {self.side} x {self.side} needs {self.side**2} classes, and split "
                f"{split.name} has images of {len(rows)}{chosen}; {remedy}"
            )
        return rows


def _cells(side: int, size: int) -> list[torch.Tensor]:
    """Return the pixels of each cell, row by row: bool [side * size, side * size]."""
    cells = torch.zeros(side, side, side * size, side * size, dtype=torch.bool)
    for y in range(side):
        for x in range(side):
            cells[y, x, y * size : (y + 1) * size, x * size : (x + 1) * size] = True
    return list(cells.flatten(0, 1))


def _laid_out(
    source: Source, side: int, grids: Sequence[tuple[int, ...]], cell: Callable[[int], torch.Tensor]
) -> "GridSource":
    """Return the source of the grids of some images, which are the uint8 pictures as they are, side by side.

    A backbone with position embeddings is loaded anew, with positions resized as its family does. cell: from a row of the
    split to its picture. Raises BadInput if the backbone takes no images of the grids' size.
    """
    network, size = source.network, source.preprocessing.size
    assert network is not None, "grids need a backbone"

    def picture(number: int) -> torch.Tensor:
        rows = torch.stack([cell(row) for row in grids[number]]).unflatten(0, (side, side))
        return rows.permute(2, 0, 3, 1, 4).reshape(3, side * size, side * size)

    # No image is resized to the size of a grid, so its rule does not matter.
    larger = replace(source.preprocessing, size=side * size, resize="squash", short_side=None)
    given = {field.name: getattr(source, field.name) for field in fields(source)}
    try:
        backbone = network.backbone_for(side * size)
        own = replace(network, backbone=backbone, picture=picture, prepared=None)
        # No store knows anything of grids.
        given |= {"preprocessing": larger, "network": own, "stored": False, "masked": {}}
        laid_out = GridSource(**given, grids=tuple(grids), side=side)
        with torch.no_grad():
            read_images(backbone, laid_out.blank(), source.features)
    except (RuntimeError, ValueError, AssertionError, BadInput):
        raise BadInput(
            f"--protocol gridpg: {network.backbone.arch} takes no images of {side * size} pixels, as a grid of {side} x "
            f"{side} has; it needs a backbone of convolutions, or one whose position embeddings can be resized"
        ) from None
    return laid_out


@dataclass(frozen=True, eq=False)
class GridSource(Source):
    """Grids of a split's images.

    grids: of each, the rows of its images, row by row. side: images along a side. images, classes: how many there were
    to draw from.
    """

    grids: tuple[tuple[int, ...], ...] = ()
    side: int = 1
    images: int = 0
    classes: int = 0

    @property
    def facts(self) -> dict[str, int]:
        """How many grids there are, and what they were drawn from."""
        return {"grids": len(self.grids), "drawn_from_images": self.images, "drawn_from_classes": self.classes}

    @property
    def name(self) -> str:
        """The split, and the size of the grids."""
        return f"{self.split.name}, {self.side}x{self.side} grids"

    def id_of(self, row: int) -> str:
        """The number of a grid, and the ids of its images."""
        return f"grid {row}: {' '.join(self.split.ids[image] for image in self.grids[row])}"

    def boxes_of(self, row: int) -> Boxed:
        """The cells of a grid, with the classes of their images."""
        size, count = self.preprocessing.size // self.side, self.side**2
        corners = [(size * x, size * y) for y in range(self.side) for x in range(self.side)]
        boxes = np.array([(x, y, x + size, y + size) for x, y in corners], float)
        return Boxed(boxes, self.split.labels[list(self.grids[row])], np.zeros(count, bool))
