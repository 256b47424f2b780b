"""`featcache inspect --dataset`: what a dataset holds, and every image decoded once."""

import os
from dataclasses import dataclass

import numpy as np

from featcache.arguments import NAME, NAMES, PATH, takes
from featcache.datasets import list_records
from featcache.datasets.complete import clip_boxes, over_threads, repeated_ids
from featcache.datasets.image import read_image
from featcache.datasets.record import Dataset
from featcache.errors import BadInput


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class SplitInspection:
    """Of one split. boxes, difficult, crowd: counts of boxes. overhanging: boxes that reach beyond their image.

    masks: images with masks. sizes: int64 [N, 2], height and width of the images that can be read.
    copies: images whose file has the bytes of an earlier one of the split. repeated_ids: ids that come twice.
    bad: (id, reason) of images that are missing, cannot be decoded, or are not as their annotation says.
    """

    images: int
    boxes: int
    difficult: int
    crowd: int
    overhanging: int
    masks: int
    sizes: np.ndarray
    copies: int
    repeated_ids: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]

    def __repr__(self):
        found = f"{self.copies} copies, {len(self.repeated_ids)} repeated ids, {len(self.bad)} bad"
        return f"SplitInspection({self.images} images, {self.boxes} boxes, {found})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class DatasetInspection:
    """Of a whole dataset. leaks: ((split, id), (split, id)) of images with equal bytes in two splits."""

    dataset: Dataset
    splits: dict[str, SplitInspection]
    leaks: tuple[tuple[tuple[str, str], tuple[str, str]], ...]

    def __repr__(self):
        return f"DatasetInspection({self.dataset.name!r}, {self.splits}, {len(self.leaks)} leaks)"

    @property
    def damaged(self):
        """Whether an extraction would stop: an image cannot be used, or an id comes twice."""
        return any(split.bad or split.repeated_ids for split in self.splits.values())


@takes(name=NAME, root=PATH, splits=NAMES)
def inspect_dataset(name, root=None, splits=None):
    """Count a dataset, decode all its images, and compare their bytes: a DatasetInspection.

    Arguments as of read_dataset. Damaged images are listed, not raised; raises BadInput if the layout or
    an annotation is broken.
    """
    dataset = list_records(name, root, splits)
    first_seen, leaks, result = {}, [], {}
    for split, records in dataset.splits.items():
        looked = list(over_threads(_look, records, f"decode {split}", "img", os.cpu_count() or 1))
        copies = 0
        for record, look in zip(records, looked, strict=True):
            places = first_seen.setdefault(look.digest, {}) if look.digest else {}
            copies += split in places
            leaks += [((other, there), (split, record.id)) for other, there in places.items() if other != split]
            places.setdefault(split, record.id)
        result[split] = SplitInspection(
            images=len(records),
            boxes=sum(len(r.boxes) for r in records),
            difficult=sum(int(r.box_difficult.sum()) for r in records),
            crowd=sum(int(r.box_crowd.sum()) for r in records if r.box_crowd is not None),
            overhanging=sum(look.overhanging for look in looked),
            masks=sum(r.masks is not None for r in records),
            sizes=np.array([look.size for look in looked if look.size], np.int64).reshape(-1, 2),
            copies=copies,
            repeated_ids=tuple(repeated_ids(records)),
            bad=tuple((r.id, look.reason) for r, look in zip(records, looked, strict=True) if look.reason),
        )
    return DatasetInspection(dataset, result, tuple(leaks))


@dataclass(slots=True)
class _Look:
    """What one image showed. digest: see read_image. reason: why it is of no use, or None."""

    size: tuple[int, int] | None = None
    digest: bytes | None = None
    overhanging: int = 0
    reason: str | None = None


def _look(record):
    look = _Look()
    try:
        image, look.digest = read_image(record.image)
        width, height = image.size
        look.size = height, width
        if record.height not in (None, height) or record.width not in (None, width):
            raise BadInput(
                f"image {record.image} is {width}x{height} pixels, its annotation says {record.width}x{record.height}"
            )
        look.overhanging = int((clip_boxes(record, height, width) != record.boxes).any(1).sum())
    except BadInput as error:
        look.reason = error.message
    return look
