"""How often each class occurs in each split, and warnings of counts that look wrong."""

from collections.abc import Sequence

import numpy as np

from featcache.datasets.record import Dataset

# More names than this are only counted.
NAMED = 5


def count_classes(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each class is present, and how often only as difficult: two int64 [C].

    labels: int8 [N, C] or int64 [N], as Dataset.labels returns them. classes: their number.
    """
    if labels.ndim == 1:
        return np.bincount(labels[labels >= 0], minlength=classes), np.zeros(classes, np.int64)
    return (labels == 1).sum(0), (labels == -1).sum(0)


def describe_classes(data: Dataset) -> list[str]:
    """Return lines that count the images and classes of each split of a Dataset, then warnings.

    The warnings are of classes that a split lacks, and of classes that occur once in all splits together.
    """
    counts = {split: count_classes(data.labels(split), len(data.classes))[0] for split in data.splits}
    lines = [f"dataset: {data.name}, {data.task}, {len(data.classes):,} classes"]
    for split, seen in counts.items():
        lines.append(f"{split}: {len(data.splits[split]):,} images, {np.count_nonzero(seen):,} classes")
    for split, seen in counts.items():
        if not seen.all():
            lacking = np.flatnonzero(seen == 0)
            lines.append(
                f"warning: {split} lacks {len(lacking):,} of {len(seen):,} classes: {_names(data.classes, lacking)}"
            )
    once = np.flatnonzero(np.sum(list(counts.values()), axis=0) == 1)
    if len(once):
        subject = "1 class is" if len(once) == 1 else f"{len(once):,} classes are"
        lines.append(
            f"warning: {subject} seen only once in all splits: {_names(data.classes, once)} (is a name misspelt, or a list "
            "of labels read as one name?)"
        )
    return lines


def _names(classes: Sequence[str], chosen: np.ndarray) -> str:
    # Names may hold commas.
    named = "; ".join(classes[n] for n in chosen[:NAMED])
    return named + (f" and {len(chosen) - NAMED:,} more" if len(chosen) > NAMED else "")
