"""STL-10 in its binary files (Coates et al., AISTATS 2011): the labelled images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.datasets.augmentation import SMALL_IMAGES
from featcache.datasets.layout import (
    known_splits,
    read_lines,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.datasets.sources import Pixels
from featcache.errors import BadInput, shown
from featcache.names import is_text

SIDE = 96
SPLITS = ("train", "test")
TREE = """
stl10_binary/class_names.txt
stl10_binary/train_X.bin, train_y.bin
stl10_binary/test_X.bin, test_y.bin
"""


def read_stl10(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read STL-10's train and test images as single-label records; the unlabelled ones are ignored.

    root: stl10_binary, or the folder that holds it.
    """
    require_folder(root)
    home = next((h for h in (root, root / "stl10_binary") if (h / "class_names.txt").is_file()), None)
    if home is None:
        raise wrong_layout(root, f"no class_names.txt in {root}", TREE)
    classes = tuple(line for _, line in read_lines(home / "class_names.txt"))
    for name in classes:
        if not is_text(name):
            raise BadInput(f"{home / 'class_names.txt'}: {shown(name)} is no name of a class")
    return Dataset(
        name="stl10",
        classes=classes,
        task="single-label",
        splits={split: _read_split(root, home, split, classes) for split in known_splits(splits, SPLITS, "stl10")},
        augmentation=SMALL_IMAGES,
        resize="crop",
    )


def _read_split(root: Path, home: Path, split: str, classes: Sequence[str]) -> tuple[Record, ...]:
    images, labels = home / f"{split}_X.bin", home / f"{split}_y.bin"
    for path in (images, labels):
        if not path.is_file():
            raise wrong_layout(root, f"no {path.name} in {home}", TREE)
    numbers = np.fromfile(labels, np.uint8)
    if not len(numbers) or images.stat().st_size != len(numbers) * 3 * SIDE * SIDE:
        raise BadInput(f"{images} is not the size of the {len(numbers)} images that {labels} labels")
    for row in np.flatnonzero((numbers < 1) | (numbers > len(classes)))[:1]:
        raise BadInput(f"{labels} row {row}: label {numbers[row]} is out of range 1 to {len(classes)}")
    # Columns come before rows in the file.
    pixels = np.memmap(images, np.uint8, "r", shape=(len(numbers), 3, SIDE, SIDE)).transpose(0, 1, 3, 2)
    return tuple(
        Record(
            id=f"{split}/{row:05d}",
            image=Pixels(f"{images} row {row}", np.asarray(pixels[row])),
            labels=int(number) - 1,
            height=SIDE,
            width=SIDE,
            image_bytes=3 * SIDE * SIDE,
        )
        for row, number in enumerate(numbers)
    )
