"""CIFAR-10 and CIFAR-100 in their python batches (Krizhevsky, 2009)."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.datasets.augmentation import SMALL_IMAGES
from featcache.datasets.layout import known_splits, require_folder, wrong_layout
from featcache.datasets.record import Dataset, Record
from featcache.datasets.sources import Pixels
from featcache.errors import BadInput

SIDE = 32


@dataclass(frozen=True)
class Layout:
    """Names of the folder and of its files, and the keys of labels and class names in them."""

    folder: str
    splits: dict[str, list[str]]
    labels: bytes
    meta: str
    names: bytes


LAYOUTS = {
    10: Layout(
        folder="cifar-10-batches-py",
        splits={"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]},
        labels=b"labels",
        meta="batches.meta",
        names=b"label_names",
    ),
    100: Layout(
        folder="cifar-100-python",
        splits={"train": ["train"], "test": ["test"]},
        labels=b"fine_labels",
        meta="meta",
        names=b"fine_label_names",
    ),
}


def read_cifar(root: Path, classes: int, splits: Sequence[str] | None = None) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 (classes: 10 or 100, the fine labels) as single-label records.

    root: the folder of the batches, or the one that holds it. A record's id is its batch and row,
    such as data_batch_1/00042. The batches are pickles: they are read without running anything.
    """
    require_folder(root)
    layout = LAYOUTS[classes]
    home = next((h for h in (root, root / layout.folder) if (h / layout.meta).is_file()), None)
    splits = known_splits(splits, tuple(layout.splits), f"cifar{classes}")
    files = [layout.meta, *(name for split in splits for name in layout.splits[split])]
    missing = [name for name in files if home is None or not (home / name).is_file()]
    if home is None or missing:
        tree = f"{layout.folder}/\n  " + "\n  ".join([layout.meta, *sum(layout.splits.values(), [])])
        raise wrong_layout(root, f"no {missing[0]} in {home or root}", tree)
    names = _load(home / layout.meta).get(layout.names)
    if not isinstance(names, list) or len(names) != classes:
        raise BadInput(f"{home / layout.meta} does not list the {classes} classes")
    try:
        names = [name.decode() for name in names]
    except (UnicodeDecodeError, AttributeError):
        raise BadInput(f"{home / layout.meta}: a class has a name that is not text") from None
    return Dataset(
        name=f"cifar{classes}",
        classes=tuple(names),
        task="single-label",
        splits={
            split: tuple(
                record for name in layout.splits[split] for record in _read_batch(home / name, layout, classes)
            )
            for split in splits
        },
        augmentation=SMALL_IMAGES,
        resize="crop",
    )


def _read_batch(path: Path, layout: Layout, classes: int) -> list[Record]:
    batch = _load(path)
    pixels: Any = batch.get(b"data")
    labels = batch.get(layout.labels)
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3 * SIDE * SIDE,)
    if not fits or not isinstance(labels, list) or len(labels) != len(pixels):
        raise BadInput(f"{path}: data must be uint8 [N, 3072], with N {layout.labels.decode()}")
    for row, label in enumerate(labels):
        if not (isinstance(label, int) and 0 <= label < classes):
            raise BadInput(f"{path} row {row}: label {label} is out of range, there are {classes} classes")
    images = pixels.reshape(-1, 3, SIDE, SIDE)
    return [
        Record(
            id=f"{path.name}/{row:05d}",
            image=Pixels(f"{path} row {row}", image),
            labels=label,
            height=SIDE,
            width=SIDE,
            image_bytes=image.nbytes,
        )
        for row, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in lists, dicts, bytes and numbers; anything else is refused before it is called."""

    ADMITTED: dict[tuple[str, str], Any] = {
        ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        # numpy 1 and numpy 2 write the same function by these two names.
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (short, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return self.ADMITTED[short, name]


def _load(path: Path) -> dict[bytes, Any]:
    """Return the dict, with keys in bytes, of a pickle. Raises BadInput; never runs what is in the file."""
    try:
        loaded = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A damaged pickle raises anything from EOFError to IndexError.
    except Exception as error:
        raise BadInput(f"cannot read {path}: {error or type(error).__name__}") from None
    if not isinstance(loaded, dict):
        raise BadInput(f"cannot read {path}: it holds no dict")
    return loaded
