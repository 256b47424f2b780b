"""What a store knows of its rows besides features: ids, labels, boxes and sizes, as small arrays."""

import numpy as np

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


def with_axes(arrays):
    """Turn {name: array} into {name: (array, names of its axes)}."""
    return {name: (array, AXES[name][: array.ndim]) for name, array in arrays.items()}


def record_arrays(dataset, split):
    """The small arrays of a dataset's split, {name: array}; docs/store-format.md describes them."""
    records = dataset.splits[split]
    ids = np.array([r.id.encode() for r in records])
    counts = [len(r.boxes) for r in records]
    return {
        "ids": ids.view(np.uint8).reshape(len(records), ids.itemsize),
        "labels": dataset.labels(split),
        "sizes": np.array([(r.height, r.width) for r in records], dtype=np.int32),
        "image_bytes": np.array([r.image_bytes for r in records], dtype=np.int64),
        "boxes": np.concatenate([r.boxes for r in records]).astype(np.float32),
        "box_classes": np.concatenate([r.box_classes for r in records]).astype(np.int64),
        "box_difficult": np.concatenate([r.box_difficult for r in records]).astype(np.uint8),
        "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    }


def view_arrays(arrays, augmentation):
    """The small arrays of a view, {name: array}, from those of its split and its augmentation, int32 [N, 5]."""
    return {"ids": arrays["ids"], "labels": arrays["labels"], "augmentation": augmentation}


def wrong_with(name, array, rows, classes, task):
    """What is wrong with a small array of a split of so many rows and classes; None if nothing is."""
    several = task == "multi-label"
    dtype, shape = {
        "ids": ("u1", (rows, None)),
        "labels": ("i1", (rows, classes)) if several else ("i8", (rows,)),
        "sizes": ("i4", (rows, 2)),
        "image_bytes": ("i8", (rows,)),
        "boxes": ("f4", (None, 4)),
        "box_classes": ("i8", (None,)),
        "box_difficult": ("u1", (None,)),
        "box_offsets": ("i8", (rows + 1,)),
        "augmentation": ("i4", (rows, 5)),
    }[name]
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


def ids_of(array):
    """The ids of an array uint8 [N, L], list of str."""
    return [bytes(row).rstrip(b"\0").decode() for row in array]


def changes(old, new):
    """Say in a few words how the records of a split changed: new against old arrays of the same names."""
    before, after = ids_of(old["ids"]), ids_of(new["ids"])
    if before != after:
        known, given = set(before), set(after)
        added, removed = [i for i in after if i not in known], [i for i in before if i not in given]
        said = [
            f"{len(rows)} images {word} (first {rows[0]})"
            for rows, word in ((added, "added"), (removed, "removed"))
            if rows
        ]
        return ", ".join(said) or "the images are in another order"
    said = []
    for name, word in (("labels", "labels"), ("sizes", "size"), ("image_bytes", "image file")):
        if old[name].shape != new[name].shape:
            said.append(f"{word}: shape {old[name].shape} -> {new[name].shape}")
            continue
        rows = np.flatnonzero((old[name] != new[name]).reshape(len(after), -1).any(1))
        if len(rows):
            said.append(f"{word} of {len(rows)} images changed (first {after[rows[0]]})")
    if not said:
        said.append("boxes changed")
    return ", ".join(said)
