"""What is explained: the classes that have a box in an image, and the pixels of boxes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from featcache.backbones.input.preprocessing import Preprocessing
from featcache.errors import BadInput
from featcache.store.reader import Split


class Target(NamedTuple):
    """A class to explain in an image: the row of the image in its split, and the number of the class.

    The pixels that its map should point at are many and quickly made, so that they are made when they are needed:
    see Source.mask_of.
    """

    row: int
    label: int


def box_mask(boxes: Iterable, size: int) -> torch.Tensor:
    """Return bool [size, size]: the pixels whose centre lies in the union of the boxes.

    boxes: [M, 4] as x0, y0, x1, y1 in pixels of the map, see Preprocessing.map_boxes.
    """
    centres = np.arange(size) + 0.5
    mask = np.zeros((size, size), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        columns = (centres >= x0) & (centres < x1)
        rows = (centres >= y0) & (centres < y1)
        mask |= rows[:, None] & columns[None, :]
    return torch.from_numpy(mask)


def find_targets(split: Split, preprocessing: Preprocessing, limit: int | None = None) -> list[Target]:
    """Return the Targets of a split, in order, in the first `limit` images that have any.

    Every class with a box that is not difficult is one, unless its boxes hold no pixel's centre of the input, as
    boxes outside a crop. Raises BadInput if there is none.
    """
    targets: list[Target] = []
    images = 0
    for row, (boxes, classes, difficult) in enumerate(split.boxes):
        boxes, _ = preprocessing.map_boxes(boxes, *split.sizes[row].tolist())
        own = {int(c): boxes[(classes == c) & ~difficult] for c in classes[~difficult]}
        visible = [Target(row, c) for c in sorted(own) if box_mask(own[c], preprocessing.size).any()]
        if visible and (limit is None or images < limit):
            images += 1
            targets += visible
    if not targets:
        raise BadInput(f"split {split.name} of store {split.store.path} has no box to score against")
    return targets
