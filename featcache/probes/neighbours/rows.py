"""The training images that neighbours are chosen from: their features, in memory or read tile by tile."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from featcache.probes.inputs.input import Input, all_alike, rows_within
from featcache.store.feature_array import PIECE_BYTES
from featcache.store.reader import Store

# Rows that are multiplied at a time; of maps, which are averaged, fewer are read at a time.
READ_ROWS = 1 << 13


class TrainingRows:
    """The features of training images as a matrix of N rows of width D, in the order of the store.

    wanted: numbers of the images among those of the splits, sorted int64 [N], or None for all of them. held: whether
    the matrix stays in memory, in the dtype of the store. norms: the Euclidean norm of every row, float64 [N]. alike:
    whether there are several rows, all the same.
    """

    def __init__(
        self,
        read: Input,
        store: Store,
        splits: Sequence[str],
        device: torch.device,
        wanted: Tensor | None = None,
        held: bool = True,
    ):
        self._read, self._device = read, device
        self._arrays = [read.arrays(store[name]) for name in splits]
        self._firsts = [int(first) for first in np.cumsum([0, *(len(arrays[0]) for arrays in self._arrays)])]
        self._wanted = None if wanted is None else wanted.cpu().numpy()
        self.count, self.width = self._firsts[-1] if wanted is None else len(wanted), read.shape(store)[0]
        self._values: Tensor | None = None
        if held:
            values = torch.empty(0)
            for first, tile in self._read_tiles():
                if not first:
                    values = tile.new_empty(self.count, self.width)
                values[first : first + len(tile)] = tile
            self._values = values
        norms, row = [], torch.empty(0)
        self.alike = self.count > 1
        for first, tile in self.tiles():
            norms.append(tile.double().norm(dim=1))
            row = row if first else tile[0]
            self.alike = self.alike and all_alike(tile, row)
        self.norms = torch.cat(norms)

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows [n, D] as stored, on the device) in order, at most READ_ROWS at a time."""
        if self._values is None:
            yield from self._read_tiles()
        else:
            yield from zip(range(0, self.count, READ_ROWS), self._values.split(READ_ROWS), strict=True)

    def pick(self, rows: Tensor) -> Tensor:
        """Return rows by their numbers in the matrix, int64 [n] on the device: [n, D] as stored."""
        if self._values is not None:
            return self._values[rows]
        numbers, back = np.unique(rows.cpu().numpy(), return_inverse=True)
        numbers = numbers if self._wanted is None else self._wanted[numbers]
        parts = []
        for first, arrays in zip(self._firsts, self._arrays, strict=False):
            own = rows_within(numbers, first, first + len(arrays[0]))
            if len(own):
                parts.append(self._on_device([array.take(own, check=True) for array in arrays]))
        return torch.cat(parts)[torch.from_numpy(back).to(self._device)]

    def _read_tiles(self) -> Iterator[tuple[int, Tensor]]:
        at = 0
        for first, arrays in zip(self._firsts, self._arrays, strict=False):
            fitting = PIECE_BYTES * len(arrays[0]) // sum(array.nbytes for array in arrays)
            step = min(max(fitting, 1), READ_ROWS)
            for start in range(0, len(arrays[0]), step):
                rows = [array[start : start + step] for array in arrays]
                if self._wanted is not None:
                    own = rows_within(self._wanted, first + start, first + start + len(rows[0]))
                    rows = [part[own] for part in rows]
                for array in arrays:
                    array.release()
                if len(rows[0]):
                    yield at, self._on_device(rows)
                at += len(rows[0])

    def _on_device(self, rows: Sequence[np.ndarray]) -> Tensor:
        return self._read.read(torch.from_numpy(part).to(self._device) for part in rows)
