"""A plain folder of images: ROOT/SPLIT/CLASS/image, or ROOT/CLASS/image as one split named `all`."""

import os
from collections.abc import Sequence
from pathlib import Path

from featcache.datasets.layout import (
    folders_in,
    holds_images,
    images_by_class,
    images_in,
    known_splits,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record

ONE_SPLIT = "all"
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
TREE = """
SPLIT/CLASS/image.jpg ...    (or CLASS/image.jpg ... for one split)
"""


def read_folder(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read a folder of class folders as single-label records.

    Classes are the sorted names of the class folders of all splits together; images are in
    the order of torchvision's ImageFolder. A record's id is the path below the split's folder.
    Raises BadInput for another layout, and for a class folder without an image.
    """
    require_folder(root)
    folders = {split: str(root / split) for split in folders_in(root)}
    flat = [split for split, folder in folders.items() if holds_images(folder)]
    if flat and SPLIT_NAMES.isdisjoint(folders):
        folders = {ONE_SPLIT: str(root)}
    elif flat:
        raise wrong_layout(root, f"{folders[flat[0]]} holds images, but no class folders", TREE)
    else:
        # Other folders, such as one of annotations, may lie beside the splits.
        folders = {split: folder for split, folder in folders.items() if _has_classes(folder)}
    classes = tuple(sorted({name for folder in folders.values() for name in folders_in(folder)}))
    if not classes:
        raise wrong_layout(root, f"no class folders in {root}", TREE)
    chosen = known_splits(splits, tuple(folders), root)
    return Dataset(
        name="folder",
        classes=classes,
        task="single-label",
        splits={split: _records(folders[split], classes) for split in chosen},
        resize="crop",
    )


def _has_classes(folder: str) -> bool:
    return any(images_in(os.path.join(folder, name)) for name in folders_in(folder))


def _records(folder: str, classes: Sequence[str]) -> tuple[Record, ...]:
    images = images_by_class(folder, classes)
    return tuple(Record(id=path.removeprefix(folder + os.sep), image=path, labels=label) for path, label in images)
