"""What a dataset is to the rest of featcache: splits of records."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.datasets.augmentation import Augmentation


@dataclass(frozen=True, eq=False)
class Record:
    """One image with what is known about it.

    labels: int8 [C] for a multi-label dataset (1 present, 0 absent, -1 only as difficult), or an
    int for a single-label one. boxes: float32 [M, 4] as (x0, y0, x1, y1) in pixels of the image,
    0-based and half open. box_classes: int64 [M]. box_difficult: bool [M].
    """

    id: str
    image: Path
    image_bytes: int
    height: int
    width: int
    labels: np.ndarray | int
    boxes: np.ndarray
    box_classes: np.ndarray
    box_difficult: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset: class names, the task, its splits in order, and what its protocol does with images.

    task: multi-label or single-label. augmentation: of the training protocol. training: names of the
    splits that it is meant for. resize: rule of featcache.backbones.preprocessing. size: side of the
    input in pixels, None to leave it to the backbone.
    """

    name: str
    classes: tuple[str, ...]
    task: str
    splits: dict[str, tuple[Record, ...]]
    augmentation: Augmentation = Augmentation()
    training: tuple[str, ...] = ("train",)
    resize: str = "squash"
    size: int | None = None

    def labels(self, split):
        """Labels of a split: int8 [N, C] if multi-label, int64 [N] if single-label."""
        records = self.splits[split]
        if self.task == "single-label":
            return np.array([r.labels for r in records], dtype=np.int64)
        return np.stack([r.labels for r in records]).astype(np.int8)

    def fingerprint(self, split):
        """sha256 (hex) over ids, labels, boxes, pixel sizes and file sizes of a split, in order.

        File sizes stand in for the pixels: they cost one stat an image and catch a replaced file.
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
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()
