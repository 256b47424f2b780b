"""iNaturalist 2018 (Van Horn et al., CVPR 2018): train2018.json and val2018.json beside train_val2018/."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.datasets.layout import (
    check_references,
    known_splits,
    read_entries,
    read_json,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

SPLITS = ("train", "val")
# Fields that every entry must have, since they are read here.
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int},
}
TREE = """
train2018.json
val2018.json
train_val2018/Aves/2820/*.jpg ...
"""


def read_inaturalist2018(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read iNaturalist 2018 as single-label records, in the order of image ids; 8142 classes in the order of theirs."""
    require_folder(root)
    classes: dict[int, str] = {}
    read: dict[str, tuple[Record, ...]] = {}
    for split in known_splits(splits, SPLITS, "inaturalist2018"):
        path = root / f"{split}2018.json"
        if not path.is_file() or not (root / "train_val2018").is_dir():
            missing = "train_val2018" if path.is_file() else path.name
            raise wrong_layout(root, f"no {missing} in {root}", TREE)
        entries = read_entries(read_json(path), FIELDS, path)
        names = {category["id"]: category["name"] for category in entries["categories"]}
        images = {image["id"]: image for image in entries["images"]}
        check_references(entries["annotations"], {"image_id": images, "category_id": names}, path)
        index = {category: n for n, category in enumerate(sorted(names))}
        labels = {annotation["image_id"]: index[annotation["category_id"]] for annotation in entries["annotations"]}
        for unlabelled in sorted(images.keys() - labels.keys())[:1]:
            raise BadInput(f"annotation {path}: image {unlabelled} has no annotation")
        read[split] = tuple(_record(root, images[image], labels) for image in sorted(images))
        if classes not in ({}, names):
            raise BadInput(f"{path}: its categories are not those of {SPLITS[0]}2018.json")
        classes = names
    return Dataset(
        name="inaturalist2018",
        classes=tuple(classes[category] for category in sorted(classes)),
        task="single-label",
        splits=read,
        resize="crop",
    )


def _record(root: Path, image: dict[str, Any], labels: Mapping[int, int]) -> Record:
    return Record(
        id=str(image["id"]),
        image=os.path.join(root, image["file_name"]),
        labels=labels[image["id"]],
        height=image.get("height"),
        width=image.get("width"),
    )
