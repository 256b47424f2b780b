"""What is explained: the classes that are in an image, and the pixels of their objects."""

import zlib
from copy import copy

import numpy as np
import torch

from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.errors import BadInput
from featcache.store.reader import Split


class Target:
    """A class to explain in an image.

    row: of the image in its split. label: the number of the class. mask: bool [S, S], the pixels that its map should
    point to, None where a protocol knows none. void: bool [S, S], the pixels that do not count, None where all do.
    Both are kept compressed, since a data set has a hundred thousand of them. pixels: how many are in the mask.
    pictured: whether its maps are kept for pictures.
    """

    def __init__(self, row: int, label: int, mask: torch.Tensor | None = None, void: torch.Tensor | None = None):
        self.row, self.label, self.pictured = row, label, False
        self.pixels = 0 if mask is None else int(mask.sum())
        self._mask, self._void = _pack(mask), _pack(void if void is not None and void.any() else None)

    def as_pictured(self) -> "Target":
        """Return the same target, whose maps are kept for pictures."""
        target = copy(self)
        target.pictured = True
        return target

    @property
    def packed(self) -> bytes:
        """Both masks as bytes, for a hash."""
        return b"".join(data for data, _ in filter(None, (self._mask, self._void)))

    @property
    def mask(self) -> torch.Tensor | None:
        """The pixels that the map should point to."""
        return _unpack(self._mask)

    @property
    def void(self) -> torch.Tensor | None:
        """The pixels that do not count."""
        return _unpack(self._void)


def _pack(pixels: torch.Tensor | None) -> tuple[bytes, int] | None:
    """Compress bool [S, S]; returns the bytes and S."""
    return None if pixels is None else (zlib.compress(np.packbits(pixels.numpy()).tobytes(), 1), len(pixels))


def _unpack(packed: tuple[bytes, int] | None) -> torch.Tensor | None:
    if packed is None:
        return None
    data, size = packed
    bits = np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8), count=size * size)
    return torch.from_numpy(bits.astype(bool)).view(size, size)


def find_targets(split: Split, preprocessing: Preprocessing, limit: int | None = None) -> list[Target]:
    """Return the Targets of a split, in order, in the first `limit` images that have any.

    Every class with a box that is not difficult is one, unless its boxes hold no pixel's centre of the input, as
    boxes outside a crop. Raises BadInput if there is none.
    """
    targets: list[Target] = []
    images = 0
    for row, (boxes, classes, difficult) in enumerate(split.boxes):
        if images == limit:
            break
        boxes, _ = preprocessing.map_boxes(boxes, *split.sizes[row].tolist())
        masks = {int(c): box_mask(boxes[(classes == c) & ~difficult], preprocessing.size) for c in classes[~difficult]}
        visible = [Target(row, label, masks[label]) for label in sorted(masks) if masks[label].any()]
        images += bool(visible)
        targets += visible
    if not targets:
        raise BadInput(
            f"split {split.name} of store {split.store.path} has no box to score against that is not difficult and that the "
            "backbone sees; --protocol faithfulness needs none"
        )
    return targets
