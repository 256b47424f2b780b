"""Everything random in fine-tuning, as functions of (seed, epoch, row).

No generator runs on from step to step. So a run is the same with any number of workers and processes, and one that was
killed goes on to the same bits.
"""

from collections.abc import Iterator

import numpy as np

from featcache.datasets.augmentation import Augmentation


class Draws:
    """The random numbers of one configuration. seed: of the run; own: of the configuration."""

    def __init__(self, seed: int, own: int):
        # With seed 0, the crops of epoch e (from 0) are those of view e + 1 that `extract --seed OWN` caches.
        self.root = (seed << 63) | own

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.root, *purpose))

    def order(self, epoch: int, rows: int) -> np.ndarray:
        """Return the order in which an epoch sees the rows, int64 [rows]."""
        return self._random(epoch, 0, 1).permutation(rows)

    def crops(self, epoch: int, sizes: np.ndarray, augmentation: Augmentation) -> np.ndarray:
        """Return an epoch's crops, int32 [N, 5]; see Augmentation.draw. sizes: int [N, 2]."""
        return augmentation.draw(sizes, self.root, epoch + 1)

    def colors(self, epoch: int, rows: int) -> np.ndarray:
        """Return for each row the seed of what is done to its pixels, int64 [rows]."""
        return self._random(epoch, 0, 2).integers(2**63, size=rows)

    def part(self, epoch: int, step: int, part: int) -> int:
        """Return the seed of what happens to one part of a mini-batch in the network: mixing, dropped paths."""
        return int(self._random(epoch, step, part, 3).integers(2**63))


def batches(order: np.ndarray, size: int, repeats: int = 1) -> list[np.ndarray]:
    """Split an epoch's rows into batches of `size` or less that differ by at most one row, so that none is tiny.

    With repeats, an epoch has one of so many rows, each so often in its batch: all rows of a batch, then all again, so
    that copies of an image are mixed with others, and fall to different processes. Copy c of row r has the number
    r + c * len(order).
    """
    first = order[: -(-len(order) // repeats)]
    copies = len(order) * np.arange(repeats)[:, None]
    return [(rows + copies).ravel() for rows in np.array_split(first, steps_of(len(order), size, repeats))]


def parts(batch: np.ndarray, size: int, ranks: int) -> list[np.ndarray]:
    """Split a batch into parts of `size` rows or less (0: any number), as many for each of so many processes.

    Where their number divides by the number of processes anyway, the parts are the same for any number of these.
    """
    count = steps_of(len(batch), size) if size else 1
    return np.array_split(batch, -(-count // ranks) * ranks)


def steps_of(rows: int, size: int, repeats: int = 1) -> int:
    """Return how many batches an epoch has. The arguments are those of `batches`.

    One row more than `size` goes into a batch where it would be alone otherwise, since one image has no variance.
    """
    rows, size = -(-rows // repeats), size // repeats
    return -(-rows // size) if size == 1 else min(-(-rows // size), max(rows // 2, 1))


def remaining(epochs: int, steps: int, done: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (epoch, step) from the first that is not done to the last. done: (whole epochs, steps of the next)."""
    for epoch in range(done[0], epochs):
        for step in range(done[1] if epoch == done[0] else 0, steps):
            yield epoch, step
