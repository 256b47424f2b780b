"""COCO 2014 and 2017: instances_{train,val}YEAR.json through pycocotools (Lin et al., ECCV 2014)."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from featcache.datasets.augmentation import MULTI_LABEL
from featcache.datasets.layout import (
    archives,
    check_references,
    known_splits,
    read_entries,
    read_flag,
    read_json,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput, shown

SPLITS = ("train", "val")
# The input side with which the reference project probes COCO.
PROTOCOL_SIZE = 448
# Fields that every entry of an instances file must have, since they are read here.
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
}
TREE = """
annotations/instances_{split}{year}.json
{split}{year}/*.jpg                          (or images/{split}{year}/)
"""


@dataclass(frozen=True, slots=True)
class CocoMasks:
    """The masks of one image's boxes: ids of annotations in an instances file."""

    annotations: str
    ids: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Return bool [M, H, W], in the order of the boxes. The first call reads the annotation file.

        Raises BadInput for a segmentation that is no mask of the image.
        """
        coco = _open_kept(self.annotations)
        return np.stack([_read_mask(coco, coco.anns[i], self.annotations) for i in self.ids])

    def read_void(self) -> None:
        """Return None: COCO assigns every pixel."""


def _read_mask(coco: Any, annotation: dict[str, Any], path: str) -> np.ndarray:
    """Return the mask of one annotation, as pycocotools decodes it, bool [H, W]. Raises BadInput if it has none."""
    image, given = coco.imgs[annotation["image_id"]], annotation["segmentation"]
    size = [image["height"], image["width"]]
    try:
        if isinstance(given, dict):
            if given.get("size") != size:
                raise ValueError(f"an RLE of size {given.get('size')}, the image is {size} (height, width)")
            if isinstance(given.get("counts"), list) and sum(given["counts"]) != size[0] * size[1]:
                raise ValueError(f"an RLE of {sum(given['counts'])} pixels, the image has {size[0] * size[1]}")
        elif not _are_polygons(given):
            raise ValueError("neither an RLE nor polygons [[x, y, x, y, x, y, ...], ...]")
        mask = coco.annToMask(annotation)
        if mask.shape != tuple(size):
            raise ValueError(f"a mask of {mask.shape}")
    # pycocotools may raise anything on a damaged RLE.
    except Exception as error:
        raise BadInput(f"annotation {path}: segmentation of annotation {annotation['id']}: {error}") from None
    return np.asarray(mask, bool)


def _are_polygons(given: Any) -> bool:
    """Return whether a segmentation is a list of [x, y, x, y, ...]. pycocotools takes a first one of four for a box."""
    parts = given if isinstance(given, list) else [given]
    numbers = all(isinstance(part, list) and len(part) % 2 == 0 and all(map(_is_number, part)) for part in parts)
    return numbers and len(parts[0]) >= 6


def read_coco(root: Path, year: int, splits: Sequence[str] | None = None) -> Dataset:
    """Read COCO's instances as multi-label records with boxes, masks and crowd flags.

    root: the folder that holds annotations/ and the image folders. Images are in the order of their ids, the 80
    classes in the order of theirs. As in mmpretrain, annotations are dropped that are flagged `ignore`, have no pixel
    of the image, have an area <= 0, or are less than 1 pixel wide or high. A class is present (1) if any other
    annotation shows it, crowds included. Images without labels stay. An image has masks if all its annotations have a
    segmentation.
    """
    require_folder(root)
    read = {split: _read_split(root, f"{split}{year}", split, year) for split in known_splits(splits, SPLITS, "COCO")}
    names = {split: classes for split, (classes, _) in read.items()}
    first, classes = next(iter(names.items()))
    for split, others in names.items():
        if others != classes:
            raise BadInput(f"{root}: the categories of {split} are not those of {first}")
    return Dataset(
        name=f"coco{year}",
        classes=classes,
        task="multi-label",
        splits={split: records for split, (_, records) in read.items()},
        size=PROTOCOL_SIZE,
        augmentation=MULTI_LABEL,
    )


def _read_split(root: Path, name: str, split: str, year: int) -> tuple[tuple[str, ...], tuple[Record, ...]]:
    """Return (class names, records)."""
    tree = TREE.format(split=split, year=year)
    annotations = root / "annotations" / f"instances_{name}.json"
    if not annotations.is_file():
        raise wrong_layout(root, f"no annotations/{annotations.name} in {root}", tree, annotations.parent)
    folder = next((f for f in (root / name, root / "images" / name) if f.is_dir()), None)
    if folder is None or archives(folder):
        raise wrong_layout(root, f"no image folder {name} in {root}", tree, folder or root / "images")
    coco = _open(annotations)
    index = {category: n for n, category in enumerate(sorted(coco.cats))}
    classes = tuple(coco.cats[category]["name"] for category in index)
    return classes, tuple(_record(coco, coco.imgs[i], str(annotations), folder, index) for i in sorted(coco.imgs))


def _open(path: str | Path) -> Any:
    from pycocotools.coco import COCO

    parsed = read_json(path)
    entries = read_entries(parsed, FIELDS, path)
    images, categories = ({entry["id"] for entry in entries[key]} for key in ("images", "categories"))
    check_references(entries["annotations"], {"image_id": images, "category_id": categories}, path)
    coco = COCO()
    coco.dataset = parsed
    # It prints its progress.
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


_open_kept = lru_cache(maxsize=2)(_open)


def _record(coco: Any, image: dict[str, Any], path: str, folder: Path, index: Mapping[int, int]) -> Record:
    height, width = image["height"], image["width"]
    kept = [annotation for annotation in coco.imgToAnns[image["id"]] if _counts(annotation, height, width, path)]
    labels = np.zeros(len(index), np.int8)
    box_classes = np.array([index[annotation["category_id"]] for annotation in kept], np.int64)
    labels[box_classes] = 1
    boxes = np.array([annotation["bbox"] for annotation in kept], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masked = bool(kept) and all(annotation.get("segmentation") for annotation in kept)
    return Record(
        id=str(image["id"]),
        image=os.path.join(folder, image["file_name"]),
        labels=labels,
        height=height,
        width=width,
        boxes=boxes.astype(np.float32),
        box_classes=box_classes,
        box_difficult=np.zeros(len(kept), bool),
        box_crowd=np.array([_flag(annotation, "iscrowd", path) for annotation in kept], bool),
        # Detection exports write [] or null: their images have boxes only.
        masks=CocoMasks(path, tuple(annotation["id"] for annotation in kept)) if masked else None,
    )


def _counts(annotation: dict[str, Any], height: int, width: int, path: str) -> bool:
    """Return whether the protocol counts an annotation. Raises BadInput if its box is none."""
    box, area = annotation.get("bbox"), annotation.get("area", 1)
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in (*box, area)):
        raise BadInput(
            f"annotation {path}: annotation {annotation['id']} needs a bbox [x, y, width, height] and a number as area"
        )
    x, y, w, h = box
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    return not _flag(annotation, "ignore", path) and inside and area > 0 and w >= 1 and h >= 1


def _flag(annotation: dict[str, Any], name: str, path: str) -> bool:
    try:
        return read_flag(annotation.get(name))
    except ValueError:
        raise BadInput(
            f"annotation {path}: {name} of annotation {annotation['id']} is {shown(annotation[name])}, expected 0 or 1"
        ) from None


def _is_number(value: Any) -> bool:
    # float32 ends at 3e38; float() takes every number below 1e300.
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
