"""Images named by lists of `path label`, as OpenMixup's data/meta/NAME holds them for every dataset."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from featcache.datasets.layout import first_file, known_splits, read_list, require_folder, wrong_layout
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

SPLITS = ("train", "val", "test")
TREE = """
meta/train.txt              lines "train/cat/1.jpg 0"; also train_labeled.txt, train_labeled_full.txt
meta/val.txt, meta/test.txt     (lists may also lie in ROOT, or beside it in ../meta/NAME-OF-ROOT)
train/cat/1.jpg ...         paths are below ROOT, or below ROOT/SPLIT
"""


def read_lists(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read the images that lists name as single-label records, in the order of the lists.

    A class is called after the folder that its images lie in, where each class has one of its own, and else by its number.
    A record's id is the path in the list. Raises BadInput for an image without a label from 0.
    """
    require_folder(root)
    lists = {split: path for split in SPLITS if (path := _list_of(root, split))}
    if not lists:
        raise wrong_layout(root, f"no list such as meta/train.txt in {root}", TREE)
    rows: dict[str, list[tuple[str, int]]] = {}
    for split, path in lists.items():
        rows[split] = []
        for number, image, label in read_list(path):
            if label is None or label < 0:
                raise BadInput(f"{path} line {number}: {image} needs a label, a number from 0")
            rows[split].append((image, label))
    chosen = known_splits(splits, tuple(lists), root)
    return Dataset(
        name="lists",
        classes=_class_names(rows),
        task="single-label",
        splits={split: _records(root, split, rows[split]) for split in chosen},
        resize="crop",
    )


def _list_of(root: Path, split: str) -> Path | None:
    names = (f"{split}.txt", f"{split}_labeled.txt", f"{split}_labeled_full.txt")
    places = (root / "meta", root, root.parent / "meta" / root.name)
    return first_file(place / name for place in places for name in names)


def _class_names(rows: Mapping[str, Sequence[tuple[str, int]]]) -> tuple[str, ...]:
    folders: dict[int, set[str]] = defaultdict(set)
    for listed in rows.values():
        for image, label in listed:
            folders[label].add(os.path.basename(os.path.dirname(image)))
    numbers = range(max(folders) + 1)
    names = [next(iter(folders[label])) for label in numbers if len(folders[label]) == 1]
    named = len(names) == len(numbers) == len(set(names)) and all(names)
    return tuple(names if named else map(str, numbers))


def _records(root: Path, split: str, listed: Sequence[tuple[str, int]]) -> tuple[Record, ...]:
    first = listed[0][0]
    home = next((folder for folder in (root, root / split) if os.path.isfile(folder / first)), None)
    if home is None:
        raise wrong_layout(root, f"image not found: {first} in {root} or {root / split}", TREE)
    return tuple(Record(id=image, image=os.path.join(home, image), labels=label) for image, label in listed)
