"""Images that are in splits of two roles, such as train and test: scores on them are too good."""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Overlap:
    """Images that two roles share. roles: such as (train, test). images: how many of the second role's, `of` all.

    example: one of them, in words.
    """

    roles: tuple[str, str]
    images: int
    of: int
    example: str

    def __str__(self):
        return f"{self.images} of the {self.of} {self.roles[1]} images are in {self.roles[0]} too"


def find_overlaps(store, splits):
    """Find the images that are in splits of two roles, told by the digests of their files.

    splits: {role: splits of the store}. Returns ([Overlap], notice). The notice is None, or a line that
    says that the store is too old to hold digests. A split that two roles name is the grid's affair,
    which allows it under parity alone.
    """
    pairs = [(a, b) for a, b in itertools.combinations(splits, 2) if not set(splits[a]) & set(splits[b])]
    known = {role: _joined([store[name].digests for name in names]) for role, names in splits.items()}
    if any(digests is None for digests in known.values()):
        return [], _not_checked(store, splits, pairs) if pairs else None
    found = []
    for a, b in pairs:
        # A type that numpy sorts; all are equally long.
        keys = [known[role].view(f"S{known[role].shape[1]}").reshape(-1) for role in (a, b)]
        in_a = np.flatnonzero(np.isin(keys[1], keys[0]))
        if len(in_a):
            first = int(np.flatnonzero(keys[0] == keys[1][in_a[0]])[0])
            example = f"{_name(store, splits[b], int(in_a[0]))} is {_name(store, splits[a], first)}"
            found.append(Overlap((a, b), len(in_a), len(keys[1]), example))
    return found, None


def _joined(parts):
    return None if any(part is None for part in parts) else np.concatenate(parts)


def _name(store, names, row):
    """Split and id of a row of a union of splits."""
    for name in names:
        if row < len(store[name]):
            return f"{name} {store[name].ids[row]!r}"
        row -= len(store[name])


def _not_checked(store, splits, pairs):
    """What is said of a store without digests: its ids may begin anew in each split, and so prove nothing."""
    said = (
        f"store {store.path} was made by an earlier version, which kept no digests of images: whether two roles share "
        "images was not checked"
    )
    for a, b in pairs:
        alike = [i for one, other in itertools.product(splits[a], splits[b]) for i in _alike(store[one], store[other])]
        if alike:
            said += (
                f"; {len(alike)} images of {b} have the id, labels, size and file length of one of {a}, "
                f"such as {alike[0]!r}"
            )
    return said


def _alike(first, second):
    """Ids of the images of the second split of which a store without digests knows the same as of one of the first."""
    place = {image: row for row, image in enumerate(first.ids)}
    rows = np.array([(place[i], row) for row, i in enumerate(second.ids) if i in place])
    if not len(rows):
        return []
    a, b = first.arrays(), second.arrays()
    same = [a[name][rows[:, 0]] == b[name][rows[:, 1]] for name in ("labels", "sizes", "image_bytes")]
    same = np.all([each.reshape(len(rows), -1).all(1) for each in same], axis=0)
    return [second.ids[row] for row in rows[same, 1]]
