"""COCO 2014 and 2017: instances_{train,val}YEAR.json through pycocotools (Lin et al., ECCV 2014)."""

import contextlib
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from featcache.datasets.layout import archives, known_splits, read_json, require_folder, wrong_layout
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

SPLITS = ("train", "val")
# The input side with which the reference project probes COCO.
PROTOCOL_SIZE = 448
TREE = """
annotations/instances_{split}{year}.json
{split}{year}/*.jpg                          (or images/{split}{year}/)
"""


@dataclass(frozen=True)
class CocoMasks:
    """The masks of one image's boxes: ids of annotations in an instances file."""

    annotations: str
    ids: tuple[int, ...]

    def read(self):
        """bool [M, H, W], in the order of the boxes. The first call reads the annotation file."""
        coco = _open_kept(self.annotations)
        return np.stack([coco.annToMask(coco.anns[i]).astype(bool) for i in self.ids])


def read_coco(root, year, splits=None):
    """Read COCO's instances as multi-label records with boxes, masks and crowd flags.

    root: the folder that holds annotations/ and the image folders. Images are in the order of their
    ids, classes in that of the category ids: 80. Of the annotations are dropped, as in mmpretrain:
    those flagged `ignore`, without pixels of the image, of area <= 0, or less than 1 pixel wide or
    high. A class is present (1) if any other annotation shows it, crowds included. Images without
    labels stay.
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
    )


def _read_split(root, name, split, year):
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
    try:
        classes = tuple(str(coco.cats[category]["name"]) for category in index)
        records = tuple(_record(coco, coco.imgs[i], str(annotations), folder, index) for i in sorted(coco.imgs))
    except KeyError as error:
        raise BadInput(f"annotation {annotations}: an image or category lacks {error}") from None
    return classes, records


def _open(path):
    from pycocotools.coco import COCO

    parsed = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = parsed.get(key) if isinstance(parsed, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and isinstance(e.get("id"), int) for e in entries
        ):
            raise BadInput(f"annotation {path}: {key!r} must be a list of objects with an integer id")
    for key in ("images", "categories"):
        if not parsed[key]:
            raise BadInput(f"annotation {path}: {key!r} is empty")
    ids = [image["id"] for image in parsed["images"]]
    if len(set(ids)) < len(ids):
        raise BadInput(f"annotation {path}: two images have the same id")
    images, categories = set(ids), {category["id"] for category in parsed["categories"]}
    for found in parsed["annotations"]:
        for key, known in (("image_id", images), ("category_id", categories)):
            if found.get(key) not in known:
                raise BadInput(f"annotation {path}: annotation {found['id']} has an unknown {key}: {found.get(key)}")
    coco = COCO()
    coco.dataset = parsed
    # It prints its progress.
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


_open_kept = lru_cache(maxsize=2)(_open)


def _record(coco, image, annotations, folder, index):
    height, width = image["height"], image["width"]
    kept = [found for found in coco.imgToAnns[image["id"]] if _counts(found, height, width, annotations)]
    labels = np.zeros(len(index), np.int8)
    box_classes = np.array([index[found["category_id"]] for found in kept], np.int64)
    labels[box_classes] = 1
    boxes = np.array([found["bbox"] for found in kept], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        id=str(image["id"]),
        image=os.path.join(folder, image["file_name"]),
        labels=labels,
        height=height,
        width=width,
        boxes=boxes,
        box_classes=box_classes,
        box_difficult=np.zeros(len(kept), bool),
        box_crowd=np.array([bool(found.get("iscrowd")) for found in kept], bool),
        masks=CocoMasks(annotations, tuple(found["id"] for found in kept)) if kept else None,
    )


def _counts(found, height, width, path):
    """Whether an annotation is one of the protocol's. Raises BadInput if its box is none."""
    box = found.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
        raise BadInput(f"annotation {path}: annotation {found['id']} needs a bbox [x, y, width, height]")
    x, y, w, h = box
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    return not found.get("ignore") and inside and found.get("area", w * h) > 0 and w >= 1 and h >= 1
