"""What is explained: the classes that have a box in an image, and the pixels of their boxes."""

from dataclasses import dataclass

import torch

from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.errors import BadInput
from featcache.store.reader import Split


@dataclass(frozen=True, eq=False)
class Target:
    """A class to explain in an image.

    row: of the image in its split. label: the number of the class. mask: bool [S, S], the pixels of its boxes, of
    which there is at least one. pictured: whether its maps are kept for pictures.
    """

    row: int
    label: int
    mask: torch.Tensor
    pictured: bool = False


def find_targets(split: Split, preprocessing: Preprocessing, limit: int | None = None) -> list[Target]:
    """Return the Targets of a split, in order, in the first `limit` images that have any.

    Every class with a box that is not difficult is one, unless its boxes hold no pixel's centre of the input, as
    boxes outside a crop. Raises BadInput if there is none.
    """
    targets: list[Target] = []
    images = 0
    for row, (boxes, classes, difficult) in enumerate(split.boxes):
        boxes, _ = preprocessing.map_boxes(boxes, *split.sizes[row].tolist())
        masks = {int(c): box_mask(boxes[(classes == c) & ~difficult], preprocessing.size) for c in classes[~difficult]}
        visible = [Target(row, label, masks[label]) for label in sorted(masks) if masks[label].any()]
        if visible and (limit is None or images < limit):
            images += 1
            targets += visible
    if not targets:
        raise BadInput(f"split {split.name} of store {split.store.path} has no box to score against")
    return targets
