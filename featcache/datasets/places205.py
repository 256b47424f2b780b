"""Places205 (Zhou et al., NIPS 2014): train_places205.csv and val_places205.csv beside the images."""

import os
from collections.abc import Sequence
from pathlib import Path

from featcache.datasets.layout import (
    first_file,
    known_splits,
    read_list,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

SPLITS = ("train", "val")
CLASSES = 205
TREE = """
trainvalsplit_places205/train_places205.csv               lines "a/abbey/gsun_0003.jpg,0"
trainvalsplit_places205/val_places205.csv                 (both may lie in ROOT or in meta/; also train.txt, val.txt)
data/vision/torralba/deeplearning/images256/a/abbey/...   (or images256/a/..., or a/...)
"""


def read_places205(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read Places205 as single-label records. Class names are the images' folders, such as `a/abbey`.

    The id of a record is the image's path in the list. Raises BadInput for a list in which one label
    has two folders, or one folder two labels.
    """
    require_folder(root)
    chosen = known_splits(splits, SPLITS, "places205")
    lists = {split: _list_of(root, split) for split in SPLITS}
    for split in chosen:
        if lists[split] is None:
            raise wrong_layout(root, f"no list of the split {split} in {root}", TREE)
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    rows: dict[str, list[tuple[int, str, int]]] = {}
    for split, path in lists.items():
        rows[split] = []
        for number, image, label in read_list(path, "," if path.suffix == ".csv" else None) if path else []:
            name = os.path.dirname(image)
            if label is None or label >= CLASSES:
                raise BadInput(f"{path} line {number}: {image} needs a label from 0 to {CLASSES - 1}")
            if names.setdefault(label, name) != name:
                raise BadInput(f"{path} line {number}: {image} has the label {label} of {names[label]}")
            if labels.setdefault(name, label) != label:
                raise BadInput(
                    f"{path} line {number}: {image} has the label {label}, others of {name} have {labels[name]}"
                )
            rows[split].append((number, image, label))
    classes = tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    return Dataset(
        name="places205",
        classes=classes,
        task="single-label",
        splits={split: _records(root, split, rows[split]) for split in chosen},
        resize="crop",
    )


def _list_of(root: Path, split: str) -> Path | None:
    names = (f"{split}_places205.csv", f"{split}.txt", f"{split}_labeled.txt", f"{split}_labeled_full.txt")
    places = (root, root / "trainvalsplit_places205", root / "meta", root.parent / "meta" / root.name)
    return first_file(place / name for place in places for name in names)


def _records(root: Path, split: str, listed: Sequence[tuple[int, str, int]]) -> tuple[Record, ...]:
    folders = ("data/vision/torralba/deeplearning/images256", "images256", split, ".")
    first = listed[0][1]
    home = next((root / folder for folder in folders if os.path.isfile(root / folder / first)), None)
    if home is None:
        raise wrong_layout(root, f"image not found: {first} anywhere in {root}", TREE)
    return tuple(Record(id=image, image=os.path.join(home, image), labels=label) for _, image, label in listed)
