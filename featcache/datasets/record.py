"""What a dataset is to the rest of featcache: splits of records."""

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from featcache.datasets.augmentation import Augmentation
from featcache.datasets.sources import ImageSource, Pixels

_NO_BOXES = np.empty((0, 4), np.float32)
_NO_CLASSES = np.empty(0, np.int64)
_NO_FLAGS = np.empty(0, bool)


class Masks(Protocol):
    """The masks of one image's boxes, which stay on disk until they are read."""

    def read(self) -> np.ndarray:
        """Return bool [M, height, width], a mask for each box."""

    def read_void(self) -> np.ndarray | None:
        """Return bool [height, width], the pixels that nobody has assigned, or None where every pixel is."""


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image with what is known about it.

    image: a path, or a source of featcache.datasets.sources. labels: int8 [C] in a multi-label
    dataset (1 present, 0 absent, -1 only as difficult), an int in a single-label one. height, width (in
    pixels) and image_bytes (the length of the file) are None until they are measured.
    boxes: float32 [M, 4] as (x0, y0, x1, y1) in pixels of the image, 0-based and half open.
    box_classes: int64 [M]. box_difficult: bool [M]. box_crowd: bool [M], None where the layout knows no crowds.
    """

    id: str
    image: ImageSource
    labels: np.ndarray | int
    height: int | None = None
    width: int | None = None
    image_bytes: int | None = None
    boxes: np.ndarray = field(default_factory=lambda: _NO_BOXES)
    box_classes: np.ndarray = field(default_factory=lambda: _NO_CLASSES)
    box_difficult: np.ndarray = field(default_factory=lambda: _NO_FLAGS)
    box_crowd: np.ndarray | None = None
    masks: Masks | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A dataset: class names, the task, its splits in order, and how its protocol resizes images.

    task: multi-label or single-label. resize: "squash" (to a square, which changes the aspect ratio) or "crop" (the
    weights' own rule, which for most is a centre crop), see docs/preprocessing.md. size: side of the protocol's input
    in pixels, None for the backbone's own. augmentation: the one of the training protocol.
    """

    name: str
    classes: tuple[str, ...]
    task: str
    splits: dict[str, tuple[Record, ...]]
    augmentation: Augmentation = Augmentation()
    resize: str = "squash"
    size: int | None = None

    def __repr__(self) -> str:
        rows = ", ".join(f"{split} {len(records)}" for split, records in self.splits.items())
        return f"Dataset({self.name!r}, {self.task}, {len(self.classes)} classes, {rows} images)"

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the splits that are for training, and so are augmented: train, trainval, train-1percent."""
        return tuple(split for split in self.splits if split.startswith("train"))

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split: int8 [N, C] if multi-label, int64 [N] if single-label."""
        records = self.splits[split]
        if self.task == "single-label":
            return np.array([r.labels for r in records], dtype=np.int64)
        return np.stack([r.labels for r in records]).astype(np.int8)

    def fingerprint(self, split: str) -> str:
        """Return the sha256 (hex) over ids, labels, boxes, pixel sizes and file sizes of a split, in order.

        File sizes stand in for the pixels: they cost one stat an image and catch a replaced file. Images
        that lie decoded in an array all have one size, so the crc32 of their pixels is included.
        """
        digest = hashlib.sha256()
        for r in self.splits[split]:
            row = [
                r.id,
                r.image_bytes,
                r.height,
                r.width,
                np.asarray(r.labels).tolist(),
                r.boxes.tolist(),
                r.box_classes.tolist(),
                r.box_difficult.tolist(),
            ]
            if r.box_crowd is not None:
                row.append(r.box_crowd.tolist())
            if isinstance(r.image, Pixels):
                row.append(zlib.crc32(r.image.array.tobytes()))
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()
