"""Rows of mapped shards: a chunk, a run of rows, or rows picked from several shards as quickly as from one array."""

from collections.abc import Mapping

import numpy as np


class MappedRows:
    """The rows of some mapped shards, picked by number in one step.

    numpy picks rows from one array only, and picking from each shard in turn takes twice as long. So this is one array
    over the memory of all the shards: its element n is the row that would begin n bytes after the lowest shard does.
    Only elements that are rows are ever read; what lies between two shards is never touched.
    """

    def __init__(self, views: Mapping[int, np.ndarray], shard_rows: int) -> None:
        """views: shards by number, each [blocks, rows of a block, ...] as `view_shard` returns it."""
        # They stay mapped as long as this object refers to them.
        self._views = dict(views)
        starts = {shard: int(view.ctypes.data) for shard, view in self._views.items()}
        lowest = min(starts, key=starts.__getitem__)
        row = self._views[lowest][0, 0]
        self._dtype, self._row, self._strides = row.dtype, row.shape, self._views[lowest].strides[:2]
        # In HDF5 a shard is one block, so that the last one may be shorter.
        self._shard_rows, self._block_rows = shard_rows, max(view.shape[1] for view in self._views.values())
        # [shards up to the last of these], in bytes after the lowest one
        self._starts = np.zeros(max(starts) + 1, np.int64)
        self._starts[list(starts)] = np.fromiter(starts.values(), np.uint64) - np.uint64(starts[lowest])
        last = max(
            self._starts[shard] + self._within(view.shape[0] - 1, view.shape[1] - 1) for shard, view in views.items()
        )
        bytes_of_row = row.reshape(-1).view(f"V{row.nbytes}")
        self._window = np.lib.stride_tricks.as_strided(bytes_of_row, (last + 1,), (1,), writeable=False)

    def _within(self, block: np.ndarray | int, row: np.ndarray | int) -> np.ndarray | int:
        """Return where a row of a block begins, in bytes after its shard does."""
        return block * self._strides[0] + row * self._strides[1]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Return where rows lie, given by their numbers within the split, int64 [n]; `take` wants it so."""
        shards, local = np.divmod(numbers, self._shard_rows)
        blocks, rows = np.divmod(local, self._block_rows)
        return self._starts[shards] + self._within(blocks, rows)

    def take(self, places: np.ndarray) -> np.ndarray:
        """Copy the rows that lie in some places, int64 [n]: [n, ...]."""
        return self._window[places].view(self._dtype).reshape(len(places), *self._row)


def chunk_of(view: np.ndarray, number: int, step: int, rows: int) -> np.ndarray:
    """Return the rows of a chunk, given by its number, of a shard of so many rows.

    view: of the shard, [blocks, rows of a block, ...]. step: chunk_rows.
    """
    block, start = divmod(number * step, view.shape[1])
    return view[block, start : start + min(step, rows - number * step)]


def copy_rows(view: np.ndarray, start: int, out: np.ndarray) -> None:
    """Copy the rows of a shard from `start` on into out, [n, ...]. view: [blocks, rows of a block, ...]."""
    row, block_rows = 0, view.shape[1]
    while row < len(out):
        block, within = divmod(start + row, block_rows)
        whole = (len(out) - row) // block_rows
        if within == 0 and whole:
            # All whole blocks in one strided copy.
            count = whole * block_rows
            target = out[row : row + count].reshape(whole, *view.shape[1:])
            np.copyto(target, view[block : block + whole])
        else:
            count = min(len(out) - row, block_rows - within)
            out[row : row + count] = view[block, within : within + count]
        row += count
