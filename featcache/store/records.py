"""What a store knows about its rows besides features: ids, labels, boxes and sizes, as small arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# Small arrays by name, each with the names of its axes.
AxedArrays = Mapping[str, tuple[np.ndarray, tuple[str, ...]]]

AXES = {
    "ids": ("row", "id_byte"),
    "labels": ("row", "class"),
    "sizes": ("row", "side"),
    "image_bytes": ("row",),
    "boxes": ("box", "corner"),
    "box_classes": ("box",),
    "box_difficult": ("box",),
    "box_offsets": ("bound",),
    "augmentation": ("row", "crop"),
}
RECORD_ARRAYS = ("ids", "labels", "sizes", "image_bytes", "boxes", "box_classes", "box_difficult", "box_offsets")
VIEW_ARRAYS = ("ids", "labels", "augmentation")


class HasRecords(Protocol):
    """The part of a Dataset that is stored."""

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]: ...

    def labels(self, split: str) -> np.ndarray: ...


def with_axes(arrays: Mapping[str, np.ndarray]) -> AxedArrays:
    """Turn {name: array} into {name: (array, names of its axes)}."""
    return {name: (array, AXES[name][: array.ndim]) for name, array in arrays.items()}


def record_arrays(dataset: HasRecords, split: str) -> dict[str, np.ndarray]:
    """Return the small arrays of a dataset's split, {name: array}; docs/store-format.md describes them."""
    records = dataset.splits[split]
    counts = [len(r.boxes) for r in records]
    return {
        "ids": ids_array([r.id for r in records]),
        "labels": dataset.labels(split),
        "sizes": np.array([(r.height, r.width) for r in records], dtype=np.int32),
        "image_bytes": np.array([r.image_bytes for r in records], dtype=np.int64),
        "boxes": np.concatenate([r.boxes for r in records]).astype(np.float32),
        "box_classes": np.concatenate([r.box_classes for r in records]).astype(np.int64),
        "box_difficult": np.concatenate([r.box_difficult for r in records]).astype(np.uint8),
        "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    }


def view_arrays(arrays: Mapping[str, np.ndarray], augmentation: np.ndarray) -> dict[str, np.ndarray]:
    """Return the small arrays of a view, {name: array}, given those of its split and its augmentation, int32 [N, 5]."""
    return {"ids": arrays["ids"], "labels": arrays["labels"], "augmentation": augmentation}


def wrong_with(name: str, array: np.ndarray, rows: int, classes: int, task: str) -> str | None:
    """Return what is wrong with a small array of a split of so many rows and classes; None if nothing is."""
    several = task == "multi-label"
    shapes: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "ids": ("u1", (rows, None)),
        "labels": ("i1", (rows, classes)) if several else ("i8", (rows,)),
        "sizes": ("i4", (rows, 2)),
        "image_bytes": ("i8", (rows,)),
        "boxes": ("f4", (None, 4)),
        "box_classes": ("i8", (None,)),
        "box_difficult": ("u1", (None,)),
        "box_offsets": ("i8", (rows + 1,)),
        "augmentation": ("i4", (rows, 5)),
    }
    dtype, shape = shapes[name]
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits:
        return f"it is {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {[n or 'any' for n in shape]}"
    ranges = {
        "labels": (-1, 1) if several else (0, classes - 1),
        "box_classes": (0, classes - 1),
        "box_difficult": (0, 1),
    }
    if name in ranges and array.size:
        least, most = ranges[name]
        if array.min() < least or array.max() > most:
            return f"it holds {array.max() if array.max() > most else array.min()}, not {least} to {most}"
    if name == "boxes" and not np.isfinite(array).all():
        return "it holds a number that is not finite"
    if name == "box_offsets" and (array[0] != 0 or (np.diff(array) < 0).any()):
        return "it does not count up from 0"
    return None


def ids_array(ids: Iterable[str]) -> np.ndarray:
    """Return ids as uint8 [N, L]: UTF-8, padded with zero bytes."""
    encoded = np.array([i.encode() for i in ids])
    return encoded.view(np.uint8).reshape(len(encoded), encoded.itemsize)


def ids_of(array: np.ndarray) -> list[str]:
    """Return the ids of an array uint8 [N, L]."""
    return [bytes(row).rstrip(b"\0").decode() for row in array]


def changes(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> str:
    """Return in a few words how the records of a split changed. old, new: its small arrays before and after."""
    before, after = ids_of(old["ids"]), ids_of(new["ids"])
    if before != after:
        return _changed_ids(before, after)
    parts = []
    for name, word in (("labels", "labels"), ("sizes", "size"), ("image_bytes", "image file")):
        if old[name].shape != new[name].shape:
            parts.append(f"{word}: shape {old[name].shape} -> {new[name].shape}")
            continue
        rows = np.flatnonzero((old[name] != new[name]).reshape(len(after), -1).any(1))
        if len(rows):
            parts.append(f"{word} of {len(rows)} images changed (first {after[rows[0]]})")
    return ", ".join(parts) or "boxes changed"


def _changed_ids(before: list[str], after: list[str]) -> str:
    known, given = set(before), set(after)
    added, removed = [i for i in after if i not in known], [i for i in before if i not in given]
    parts = [
        f"{len(ids)} images {word} (first {ids[0]})" for ids, word in ((added, "added"), (removed, "removed")) if ids
    ]
    return ", ".join(parts) or "the images are in another order"
