"""From labels as people write them, names or indices, one or several an image, to a Dataset of class indices."""

import numbers

import click
import numpy as np

from featcache.datasets.label_lists import split_texts
from featcache.datasets.layout import known_splits, whole_number
from featcache.datasets.record import Dataset
from featcache.errors import BadInput, shown
from featcache.names import is_text, split_name

# No dataset has more classes; a larger index is some other number, such as an id.
MOST_CLASSES = 1_000_000


def index_labels(values, where, place, names=None, rule="label", advice=()):
    """Return (class names, task, labels) of the labels of all images of all splits together.

    values: for each image a label, or a list of labels (then all are multi-label). A label is an
    index from 0, also written as digits, or a class name. Texts that are lists are split as `rule`
    says, see split_texts, with a notice of it. where: function from the position in `values` to words
    for messages; place: what holds them all. names: class names, if known. advice: lines for the end
    of the notice. Indices alone yield the names "0" to the largest; names alone are sorted. labels: ints, or int8 [C].
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
    found = {label for labels in lists for label in labels}
    if names is None:
        names = _names(found, lists, where)
    if note:
        task = "multi-label" if several else "single-label"
        click.echo("; ".join([f"notice: {place} {note}: {task}, {len(names):,} classes", *advice]), err=True)
    index = {name: n for n, name in enumerate(names)}
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


def group_splits(name, classes, task, rows, splits, place):
    """A Dataset from rows (split, Record): of the splits asked for, else of all. place: for messages."""
    found = {}
    for split, record in rows:
        if split not in found:
            try:
                split_name(split)
            except BadInput as error:
                raise BadInput(f"{place}: {error.message}") from None
        found.setdefault(split, []).append(record)
    chosen = known_splits(splits, tuple(found), place)
    return Dataset(
        name=name,
        classes=classes,
        task=task,
        splits={split: tuple(found[split]) for split in chosen},
        resize="crop" if task == "single-label" else "squash",
    )


def _plain(label, where, n):
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        return int(label)
    if is_text(label):
        number = whole_number(label)
        return label.strip() if number is None else number
    raise BadInput(f"{where(n)}: label {shown(label)} is neither a class index nor a name")


def _names(found, lists, where):
    indices = {label for label in found if isinstance(label, int)}
    if indices and indices != found:
        name = min(found - indices)
        n = next(n for n, labels in enumerate(lists) if name in labels)
        raise BadInput(f"{where(n)}: label {shown(name)} is a name, where other images have class indices")
    if not indices:
        return sorted(found)
    for n, labels in enumerate(lists):
        for label in labels:
            if not 0 <= label < MOST_CLASSES:
                raise BadInput(f"{where(n)}: label {shown(label)} is out of range; class indices count from 0")
    return [str(n) for n in range(max(indices) + 1)]
