"""`featcache inspect --dataset`: what a dataset holds, and every image decoded once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.arguments import NAME, NAMES, PATH, takes
from featcache.datasets import list_records
from featcache.datasets.complete import clip_boxes, over_threads, repeated_ids
from featcache.datasets.image import read_image
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class SplitInspection:
    """What one split holds.

    boxes, difficult, crowd: counts of boxes. overhanging: number of boxes that reach beyond their image. masks: number
    of images with masks. sizes: int64 [N, 2], height and width of the images that can be read. copies: number of
    images whose file has the bytes of an earlier one of the split. repeated_ids: ids that come twice. bad: (id, reason)
    of images that are missing, cannot be decoded, or are not as their annotation says.
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

    def __repr__(self) -> str:
        problems = f"{self.copies} copies, {len(self.repeated_ids)} repeated ids, {len(self.bad)} bad"
        return f"SplitInspection({self.images} images, {self.boxes} boxes, {problems})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class DatasetInspection:
    """What a whole dataset holds. leaks: ((split, id), (split, id)) of images with equal bytes in two splits."""

    dataset: Dataset
    splits: dict[str, SplitInspection]
    leaks: tuple[tuple[tuple[str, str], tuple[str, str]], ...]

    def __repr__(self) -> str:
        return f"DatasetInspection({self.dataset.name!r}, {self.splits}, {len(self.leaks)} leaks)"

    @property
    def damaged(self) -> bool:
        """Whether an extraction would stop: an image cannot be used, or an id comes twice."""
        return any(split.bad or split.repeated_ids for split in self.splits.values())


@takes(name=NAME, root=PATH, splits=NAMES)
def inspect_dataset(
    name: str, root: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None
) -> DatasetInspection:
    """Count a dataset, decode all its images, and compare their bytes.

    Takes the arguments of read_dataset. Damaged images are listed, not raised; raises BadInput if the layout or
    an annotation is broken.

        inspection = featcache.inspect_dataset("voc", root="/data")
        inspection.damaged, inspection.splits["train"].boxes, inspection.leaks
    """
    dataset = list_records(name, root, splits)
    # {digest: {split: id of the first image with these bytes}}
    first_seen: dict[bytes, dict[str, str]] = {}
    leaks: list[tuple[tuple[str, str], tuple[str, str]]] = []
    result = {}
    for split, records in dataset.splits.items():
        looks = list(over_threads(_look, records, f"decode {split}", "img", os.cpu_count() or 1))
        copies = 0
        for record, look in zip(records, looks, strict=True):
            places = first_seen.setdefault(look.digest, {}) if look.digest else {}
            copies += split in places
            leaks += [((other, twin), (split, record.id)) for other, twin in places.items() if other != split]
            places.setdefault(split, record.id)
        result[split] = SplitInspection(
            images=len(records),
            boxes=sum(len(r.boxes) for r in records),
            difficult=sum(int(r.box_difficult.sum()) for r in records),
            crowd=sum(int(r.box_crowd.sum()) for r in records if r.box_crowd is not None),
            overhanging=sum(look.overhanging for look in looks),
            masks=sum(r.masks is not None for r in records),
            sizes=np.array([look.size for look in looks if look.size], np.int64).reshape(-1, 2),
            copies=copies,
            repeated_ids=tuple(repeated_ids(records)),
            bad=tuple((r.id, look.reason) for r, look in zip(records, looks, strict=True) if look.reason),
        )
    return DatasetInspection(dataset, result, tuple(leaks))


@dataclass(slots=True)
class _Look:
    """What one image showed. digest: see read_image. reason: why it is of no use, or None."""

    size: tuple[int, int] | None = None
    digest: bytes | None = None
    overhanging: int = 0
    reason: str | None = None


def _look(record: Record) -> _Look:
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
