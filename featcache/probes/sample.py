"""Which training images a probe learns from: all of them, a stratified draw, or those of a list. And folds to hold out.

A draw gives every image a random number, which depends on the draw and on the image's row alone, and takes the images
with the smallest numbers in each class. So draws are nested: one shot is among two, 1% is within 10%. The numbers are
raw outputs of PCG64, which numpy keeps the same in all versions and on all machines.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from featcache.datasets.layout import IMAGE_SUFFIXES, read_lines, whole_number
from featcache.errors import BadInput, shown

Rows = np.ndarray
# What scores call the images of train that a fold holds out, as they call other images by their role.
FOLDS = "folds"


@dataclass(frozen=True)
class Sample:
    """Which training images a probe learns from, as its spec says it. See draw_rows, listed_rows and fold_numbers.

    subset: a list by its name and the digest of its ids, as `NAME#DIGEST`. fold: the fold that is held out, from 1, of
    how many, as `1/5`. refit: the roles that the probe learns from, as `train+val`; None is train alone.
    """

    label_fraction: float | None = None
    shots: int | None = None
    subset: str | None = None
    draw: int = 0
    fold: str | None = None
    refit: str | None = None

    @property
    def drawn(self) -> bool:
        """Whether it is drawn, so that the seed of the draw matters."""
        return self.label_fraction is not None or self.shots is not None

    @property
    def partial(self) -> bool:
        """Whether it may leave out some images of the role train, not counting a fold."""
        return self.drawn or self.subset is not None

    @property
    def name(self) -> str:
        """Its name in run.json and in messages, such as `shots 8, draw 0`; empty for all of train."""
        parts = [
            f"label_fraction {self.label_fraction:g}" if self.label_fraction is not None else "",
            f"shots {self.shots}" if self.shots is not None else "",
            f"subset {self.subset}" if self.subset is not None else "",
            f"draw {self.draw}" if self.drawn else "",
            f"without fold {self.fold}" if self.fold else "",
            f"refit {self.refit}" if self.refit else "",
        ]
        return ", ".join(filter(None, parts))


def random_order(count: int, draw: int) -> Rows:
    """Return the rows 0 to count - 1 in the random order of a draw, int64 [count]."""
    return np.argsort(_numbers(count, draw), kind="stable")


def draw_rows(
    labels: np.ndarray,
    classes: Sequence[str],
    label_fraction: float | None = None,
    shots: int | None = None,
    draw: int = 0,
) -> Rows:
    """Draw some of the images, by their labels: sorted rows, int64 [n].

    labels: int64 [N], or int8 [N, C] where 1 is present. classes: their names. Give one of the two: label_fraction, the
    share of each class that is drawn, rounded to the nearest number of images; or shots, the number of images of each
    class. draw: the seed.

    With several labels an image belongs to the rarest class that it shows, and label_fraction takes that share of each
    of these groups, and of the images without a class. shots takes, for every class, the first images of the random
    order that show it; as an image may show other classes too, a class can have more. All labels of a drawn image count.

    Raises BadInput if a class is left without an image, or has fewer than `shots`.

        rows = draw_rows(store["train"].labels, store.classes, shots=8, draw=0)
    """
    if label_fraction is not None:
        strata = _strata(labels)
        sizes = np.bincount(strata)
        rows = _first(strata, np.floor(label_fraction * sizes + 0.5).astype(np.int64), draw)
        _check_classes(labels, rows, classes, f"a share of {label_fraction:g}", "take a larger share, or shots")
        return rows
    if shots is None:
        raise ValueError("draw_rows needs label_fraction or shots")
    counts = positives(labels, len(classes))
    if len(few := np.flatnonzero(counts < shots)):
        least = few[counts[few].argmin()]
        more = f"; {len(few)} classes have too few" if len(few) > 1 else ""
        raise BadInput(
            f"{shots} images of each class are asked for, and class {classes[least]!r} has {counts[least]}{more}"
        )
    if labels.ndim == 1:
        return _first(labels, np.full(len(classes), shots), draw)
    order = random_order(len(labels), draw)
    chosen = [order[labels[order, c] == 1][:shots] for c in range(len(classes))]
    return np.unique(np.concatenate(chosen))


def listed_rows(path: str | Path, ids: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> Rows:
    """Return the rows of the images that a file lists, one a line: sorted, int64 [n].

    A line is an id; or a name with a folder, an ending or both, where the ids of the store have none; or one of these
    and the number of the class, as published lists have it. ids: of the N images. labels, classes: as for draw_rows.

    Raises BadInput for a line that names no image, several, or one that another line names; for a class that is not the
    image's; and if a class is left without an image.
    """
    exact = {name: [row] for row, name in enumerate(ids)}
    if len(exact) < len(ids):
        raise BadInput(f"{path} names images by their ids, and the training images have ids that are used twice")
    alike: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        for form in _forms(name)[1:]:
            alike.setdefault(form, []).append(row)

    def named(text: str) -> list[int]:
        forms = _forms(text)
        return next((known[form] for known in (exact, alike) for form in forms if form in known), [])

    lines: dict[int, int] = {}
    for number, text in read_lines(path):
        where, matches, label = f"{path} line {number}", named(text), None
        if not matches and len(words := text.rsplit(maxsplit=1)) == 2 and (label := whole_number(words[1])) is not None:
            text, matches = words[0], named(words[0])
        if len(matches) != 1:
            problem = (
                f"is the name of {len(matches)} training images" if matches else "is the name of no training image"
            )
            raise BadInput(f"{where}: {shown(text)} {problem}; the store calls them {shown(ids[0])} and so on")
        (row,) = matches
        if row in lines:
            raise BadInput(f"{where}: names {shown(ids[row])}, as line {lines[row]} does")
        if label is not None and labels.ndim == 1 and label != labels[row]:
            raise BadInput(
                f"{where}: gives {shown(text)} the class {label}, and in the store it is of class {labels[row]}"
            )
        lines[row] = number
    rows = np.array(sorted(lines), dtype=np.int64)
    _check_classes(labels, rows, classes, f"{path}", "add some of them")
    return rows


def fold_numbers(labels: np.ndarray, classes: Sequence[str], folds: int, draw: int = 0) -> np.ndarray:
    """Deal the images out to folds, so that each has its share of every class: the number of each image's fold, int64 [N].

    labels, classes: as for draw_rows. draw: the seed. With several labels, classes are dealt from the rarest to the most
    frequent, each image to the fold that has the fewest of its class, then to the smallest (as in Sechidis et al., On
    the Stratification of Multi-Label Data, 2011). Raises BadInput if a fold is left without an image of a class.

        numbers = fold_numbers(labels, classes, folds=5)
        train, held_out = numbers != 0, numbers == 0  # of the first fold
    """
    numbers = np.empty(len(labels), dtype=np.int64)
    if labels.ndim == 1:
        order = np.lexsort((_numbers(len(labels), draw), labels))
        numbers[order] = np.arange(len(labels)) % folds
    else:
        sizes, held = np.zeros(folds, dtype=np.int64), np.zeros((folds, labels.shape[1] + 1), dtype=np.int64)
        strata, shows = _strata(labels), np.pad(labels == 1, ((0, 0), (0, 1)))
        by_size = np.argsort(np.bincount(strata, minlength=held.shape[1]), kind="stable")
        rank = np.argsort(by_size)
        for row in np.lexsort((_numbers(len(labels), draw), rank[strata])):
            fold = np.lexsort((sizes, held[:, strata[row]]))[0]
            numbers[row] = fold
            sizes[fold] += 1
            held[fold] += shows[row]
    counts = np.array([positives(labels[numbers == fold], len(classes)) for fold in range(folds)])
    lacking = np.flatnonzero((counts == 0).any(0) & (counts.sum(0) > 0))
    if len(lacking):
        least = lacking[counts.sum(0)[lacking].argmin()]
        raise BadInput(
            f"class {classes[least]!r} has {counts[:, least].sum()} images, and each of {folds} folds needs one; take "
            "fewer folds"
        )
    return numbers


def digest(ids: Sequence[str]) -> str:
    """Return 16 hex digits of the sha256 over ids, one a line."""
    return hashlib.sha256("\n".join(ids).encode(errors="surrogatepass")).hexdigest()[:16]


def positives(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return how many images show each class, int64 [C]. labels: as for draw_rows."""
    return np.bincount(labels[labels >= 0], minlength=classes) if labels.ndim == 1 else (labels == 1).sum(0)


def _numbers(count: int, draw: int) -> np.ndarray:
    """Return the random number of each row, uint64 [count]."""
    return np.random.PCG64(draw).random_raw(count)


def _strata(labels: np.ndarray) -> np.ndarray:
    """Return the class that each image is counted under: its own, or the rarest that it shows; C if it shows none."""
    if labels.ndim == 1:
        return labels
    counts = np.append((labels == 1).sum(0), len(labels) + 1)
    weighed = np.where(labels == 1, counts[:-1], len(labels) + 1)
    rarest = weighed.argmin(1)
    return np.where((labels == 1).any(1), rarest, labels.shape[1])


def _first(strata: np.ndarray, quota: np.ndarray, draw: int) -> Rows:
    """Return the first quota[s] rows of every stratum s, in the random order of a draw; sorted."""
    order = np.lexsort((_numbers(len(strata), draw), strata))
    ordered = strata[order]
    place = np.arange(len(strata)) - np.searchsorted(ordered, ordered)
    return np.sort(order[place < quota[ordered]])


def _check_classes(labels: np.ndarray, rows: Rows, classes: Sequence[str], what: str, remedy: str) -> None:
    """Raise BadInput if some rows hold no image of a class that has images."""
    of_all, of_rows = positives(labels, len(classes)), positives(labels[rows], len(classes))
    if len(lost := np.flatnonzero((of_all > 0) & (of_rows == 0))):
        most = lost[of_all[lost].argmax()]
        more = f"; {len(lost)} classes are left without one" if len(lost) > 1 else ""
        raise BadInput(f"{what} holds no image of class {classes[most]!r}, which has {of_all[most]}{more}; {remedy}")


def _forms(name: str) -> list[str]:
    """Return the forms in which lists write a name, the most specific first: whole, without ending, without folder."""
    path = PurePosixPath(name)
    # Only what looks like the ending of a file is one: ids may hold dots.
    bare = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
    return list(dict.fromkeys([name, name.removesuffix(path.name) + bare, path.name, bare]))
