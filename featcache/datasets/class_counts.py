"""How often each class is seen in each split, and what about it should make one look twice."""

import numpy as np

# More names than this are summed up.
NAMED = 5


def count_classes(labels, classes):
    """How often each class is present, and how often only as difficult: two int64 [C].

    labels: int8 [N, C] or int64 [N], as of Dataset.labels. classes: their number.
    """
    if labels.ndim == 1:
        return np.bincount(labels[labels >= 0], minlength=classes), np.zeros(classes, np.int64)
    return (labels == 1).sum(0), (labels == -1).sum(0)


def describe_classes(data):
    """Lines that count the images and classes of each split of a Dataset, then warnings.

    Warned of are classes that a split lacks, and classes that are seen once in all splits together.
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
    once = np.flatnonzero(sum(counts.values()) == 1)
    if len(once):
        seen = "1 class is" if len(once) == 1 else f"{len(once):,} classes are"
        lines.append(
            f"warning: {seen} seen only once in all splits: {_names(data.classes, once)} (is a name misspelt, or a list "
            "of labels read as one name?)"
        )
    return lines


def _names(classes, chosen):
    # Names may hold commas.
    named = "; ".join(classes[n] for n in chosen[:NAMED])
    return named + (f" and {len(chosen) - NAMED:,} more" if len(chosen) > NAMED else "")
