"""A Hugging Face dataset that `save_to_disk` wrote; needs the package `datasets`."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from featcache.datasets.labels import group_splits, index_labels
from featcache.datasets.layout import require_folder, wrong_layout
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput

ONE_SPLIT = "all"
TREE = """
dataset_dict.json, SPLIT/dataset_info.json ...    (a DatasetDict, by save_to_disk)
dataset_info.json, state.json, *.arrow            (or a Dataset: one split)
"""


@dataclass(frozen=True, slots=True)
class HuggingFaceImage:
    """The image of one row. split: None if the folder holds one Dataset. column: the name of the image column."""

    root: str
    split: str | None
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.root} {self.split or ONE_SPLIT} row {self.row}"

    def open(self) -> IO[bytes]:
        """Open the encoded image, in memory-mapped Arrow files or in a file of its own."""
        cell = _open_split(self.root, self.split, self.column)[self.row][self.column]
        if cell is None:
            raise FileNotFoundError(f"row {self.row} has no image")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


def read_huggingface(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read a saved Dataset or DatasetDict: its one Image column, and its label column.

    Labels are a ClassLabel, integers or strings, or sequences of them (multi-label), in the column named
    label or labels, else in the only column of ClassLabel. A record's id is its row.
    Raises BadInput if the columns do not tell which is which.
    """
    require_folder(root)
    loaded = _load(root)
    named = loaded if isinstance(loaded, dict) else {ONE_SPLIT: loaded}
    if not named:
        raise BadInput(f"the Hugging Face dataset {root} has no splits")
    features = next(iter(named.values())).features
    image, label = _columns(root, features)
    rows = [(split, row) for split in named for row in range(len(named[split]))]
    values = [value for split in named for value in named[split].with_format(None).select_columns(label)[:][label]]
    kind = features[label]
    names = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)
    place = f"column {label!r} of {root}"
    classes, task, labels = index_labels(values, lambda n: "{} {} row {}".format(root, *rows[n]), place, names)
    records = [
        (split, Record(str(row), HuggingFaceImage(str(root), split if named is loaded else None, image, row), value))
        for (split, row), value in zip(rows, labels, strict=True)
    ]
    return group_splits("huggingface", classes, task, records, splits, root)


def _load(root: Path) -> Any:
    if not any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise wrong_layout(root, f"no saved Hugging Face dataset in {root}", TREE)
    try:
        import datasets
    except ImportError:
        raise BadInput(
            "--dataset huggingface needs the package datasets: pip install 'featcache[huggingface]'"
        ) from None
    try:
        return datasets.load_from_disk(str(root))
    # Arrow, JSON and the library itself each raise their own errors.
    except Exception as error:
        # The first sentence says what is wrong; lists of all that would be right follow.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(f"cannot read the Hugging Face dataset {root}: {reason}") from None


@lru_cache(maxsize=8)
def _open_split(root: str, split: str | None, column: str) -> Any:
    """Open the rows of a split, once for each process, with the images left encoded."""
    import datasets

    loaded = datasets.load_from_disk(root)
    rows = loaded if split is None else loaded[split]
    return rows.with_format(None).select_columns(column).cast_column(column, datasets.Image(decode=False))


def _columns(root: Path, features: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels: list[str] = [n for n in ("label", "labels") if n in kinds] or [
        n for n, kind in kinds.items() if kind == "ClassLabel"
    ]
    if len(images) != 1 or len(labels) != 1:
        held = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise BadInput(f"{root} needs one Image column and one named label or of ClassLabel; it holds {held}")
    return images[0], labels[0]
