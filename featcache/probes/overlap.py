"""Find images that two roles share, such as train and test. Scores on them are too good."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featcache.store.reader import Split, Store


@dataclass(frozen=True)
class Overlap:
    """Images that two roles share.

    roles: such as (train, test). images: how many of the second role's images are shared, `of`: how many it has.
    example: one of them, in words.
    """

    roles: tuple[str, str]
    images: int
    of: int
    example: str

    def __str__(self) -> str:
        return f"{self.images} of the {self.of} {self.roles[1]} images are in {self.roles[0]} too"


def find_overlaps(store: Store, splits: Mapping[str, Sequence[str]]) -> tuple[list[Overlap], str | None]:
    """Find the images that two roles share, by the digests of their files.

    splits: {role: splits of the store}. Returns ([Overlap], notice), where the notice is None, or a line that says that
    the store is too old to hold digests. Roles that share a whole split are not compared: the grid allows that only
    under parity.
    """
    pairs = [(a, b) for a, b in itertools.combinations(splits, 2) if not set(splits[a]) & set(splits[b])]
    known = {role: _joined([store[name].digests for name in names]) for role, names in splits.items()}
    digests = {role: rows for role, rows in known.items() if rows is not None}
    if len(digests) < len(known):
        return [], _not_checked(store, splits, pairs) if pairs else None
    overlaps = []
    for a, b in pairs:
        # As strings of bytes, which numpy can sort; all are equally long.
        keys = [digests[role].view(f"S{digests[role].shape[1]}").reshape(-1) for role in (a, b)]
        in_a = np.flatnonzero(np.isin(keys[1], keys[0]))
        if len(in_a):
            first = int(np.flatnonzero(keys[0] == keys[1][in_a[0]])[0])
            example = f"{image_name(store, splits[b], int(in_a[0]))} is {image_name(store, splits[a], first)}"
            overlaps.append(Overlap((a, b), len(in_a), len(keys[1]), example))
    return overlaps, None


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the digests of a union of splits, None if any of the splits has none."""
    rows = [part for part in parts if part is not None]
    return np.concatenate(rows) if len(rows) == len(parts) else None


def image_name(store: Store, names: Iterable[str], row: int) -> str:
    """Name a row of a union of splits by its split and id."""
    for name in names:
        if row < len(store[name]):
            return f"{name} {store[name].ids[row]!r}"
        row -= len(store[name])
    raise IndexError(row)


def _not_checked(store: Store, splits: Mapping[str, Sequence[str]], pairs: Iterable[tuple[str, str]]) -> str:
    """Return the notice about a store without digests. Equal ids alone prove nothing, as each split may count anew."""
    notice = (
        f"store {store.path} was made by an earlier version, which kept no digests of images: whether two roles share "
        "images was not checked"
    )
    for a, b in pairs:
        alike = [i for one, other in itertools.product(splits[a], splits[b]) for i in _alike(store[one], store[other])]
        if alike:
            notice += (
                f"; {len(alike)} images of {b} have the id, labels, size and file length of one of {a}, "
                f"such as {alike[0]!r}"
            )
    return notice


def _alike(first: Split, second: Split) -> list[str]:
    """Return the ids of the images in the second split that equal one of the first in all that the store records."""
    place = {image: row for row, image in enumerate(first.ids)}
    rows = np.array([(place[i], row) for row, i in enumerate(second.ids) if i in place])
    if not len(rows):
        return []
    a, b = first.arrays(), second.arrays()
    fields = [a[name][rows[:, 0]] == b[name][rows[:, 1]] for name in ("labels", "sizes", "image_bytes")]
    same = np.all([equal.reshape(len(rows), -1).all(1) for equal in fields], axis=0)
    return [second.ids[row] for row in rows[same, 1]]
