"""From labels as people write them (names or indices, one or several an image) to a Dataset of class indices."""

import numbers
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from featcache.datasets.label_lists import Where, split_texts
from featcache.datasets.layout import known_splits, whole_number
from featcache.datasets.record import Dataset, Record
from featcache.errors import BadInput, shown
from featcache.names import is_text, split_name
from featcache.progress import say

# No dataset has more classes; a larger index is another number, such as an id.
MOST_CLASSES = 1_000_000


def index_labels(
    values: Sequence[Any],
    where: Where,
    place: str,
    names: Sequence[str] | None = None,
    rule: str = "label",
    advice: Sequence[str] = (),
) -> tuple[tuple[str, ...], str, Sequence[int | np.ndarray]]:
    """Return (class names, task, labels) for the labels of all images of all splits together.

    values: for each image a label, or a list of labels (then all are multi-label). A label is an index from 0, which
    may be written as digits, or a class name. Texts that are lists are split as `rule` says, see split_texts, with a
    notice. where: function that names a position in `values` in messages; place: names all of them. names: class
    names, if known; otherwise indices alone yield the names "0" to the largest, and names alone are sorted. advice:
    lines for the end of the notice. The labels returned are ints, or int8 [C].
    Raises BadInput for labels of mixed kinds and for one that is out of range.
    """
    for name in names or ():
        if not is_text(name):
            raise BadInput(f"{place}: a class has the name {shown(name)}, which is not text that can be written")
    values, note = split_texts(values, rule, where)
    several = bool(values) and isinstance(values[0], (list, tuple))
    for n, value in enumerate(values):
        if isinstance(value, (list, tuple)) != several:
            raise BadInput(f"{where(n)}: one label, where other images have a list, or the reverse")
    lists = [[_plain(label, where, n) for label in (value if several else [value])] for n, value in enumerate(values)]
    if names is None:
        names = _names(lists, where)
    if note:
        task = "multi-label" if several else "single-label"
        say("; ".join([f"notice: {place} {note}: {task}, {len(names):,} classes", *advice]))
    index: dict[int | str, int] = {name: n for n, name in enumerate(names)}
    index |= {n: n for n in range(len(names))}
    for n, labels in enumerate(lists):
        for label in labels:
            if label not in index:
                raise BadInput(f"{where(n)}: label {shown(label)} is out of range, there are {len(names)} classes")
    if not several:
        return tuple(names), "single-label", [index[label] for (label,) in lists]
    rows = []
    for labels in lists:
        rows.append(np.zeros(len(names), np.int8))
        rows[-1][[index[label] for label in labels]] = 1
    return tuple(names), "multi-label", rows


def group_splits(
    name: str,
    classes: tuple[str, ...],
    task: str,
    rows: Iterable[tuple[str, Record]],
    splits: Sequence[str] | None,
    place: str | PathLike[str],
) -> Dataset:
    """Make a Dataset from rows (split, Record): of the splits asked for, else of all. place: for messages."""
    records: dict[str, list[Record]] = {}
    for split, record in rows:
        if split not in records:
            try:
                split_name(split)
            except BadInput as error:
                raise BadInput(f"{place}: {error.message}") from None
        records.setdefault(split, []).append(record)
    chosen = known_splits(splits, tuple(records), place)
    return Dataset(
        name=name,
        classes=classes,
        task=task,
        splits={split: tuple(records[split]) for split in chosen},
        resize="crop" if task == "single-label" else "squash",
    )


def _plain(label: Any, where: Where, n: int) -> int | str:
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        return int(label)
    if is_text(label):
        number = whole_number(label)
        return label.strip() if number is None else number
    raise BadInput(f"{where(n)}: label {shown(label)} is neither a class index nor a name")


def _names(lists: Sequence[Sequence[int | str]], where: Where) -> list[str]:
    """Return the class names that labels make: sorted names, or "0" to the largest index."""
    indices = {label for labels in lists for label in labels if isinstance(label, int)}
    texts = {label for labels in lists for label in labels if isinstance(label, str)}
    if indices and texts:
        name = min(texts)
        n = next(n for n, labels in enumerate(lists) if name in labels)
        raise BadInput(f"{where(n)}: label {shown(name)} is a name, where other images have class indices")
    if not indices:
        return sorted(texts)
    for n, labels in enumerate(lists):
        for label in labels:
            if isinstance(label, int) and not 0 <= label < MOST_CLASSES:
                raise BadInput(f"{where(n)}: label {shown(label)} is out of range; class indices count from 0")
    return [str(n) for n in range(max(indices) + 1)]
