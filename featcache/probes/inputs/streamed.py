"""Training features that are read anew in every epoch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from featcache.probes.inputs.batches import Piece
from featcache.probes.inputs.input import Input
from featcache.store.feature_array import FeatureArray
from featcache.store.reader import Store

# Neighbouring rows of a split: (the arrays of the features, first row, end, row of the union at which the split begins).
Chunk = tuple[list[FeatureArray], int, int, int]


class Streamed:
    """An input from a union of splits that is read once in every epoch, through a shuffle buffer.

    Chunks of neighbouring rows are drawn at random from all splits until the buffer is full, and its rows are shuffled.
    The next buffer is read while training uses this one. The order of the rows depends on buffer_rows as well as on
    seed and epoch, so buffer_rows is part of a run.
    """

    def __init__(self, input: Input, store: Store, splits: Sequence[str], buffer_rows: int):
        self._input, self._store, self._splits, self._buffer_rows = input, store, splits, buffer_rows

    def pieces(self, view: int, seed: int, epoch: int) -> Iterator[Piece]:
        """Yield the Pieces of an epoch; every row is in exactly one."""
        splits = [self._input.arrays(self._store[name].view(view)) for name in self._splits]
        firsts = np.cumsum([0, *(len(arrays[0]) for arrays in splits)])
        # Powers of two, so that the largest is made of whole chunks of all features.
        chunk_rows = max(array.chunk_rows for array in splits[0])
        chunks = [
            (arrays, start, min(start + chunk_rows, len(arrays[0])), int(first))
            for arrays, first in zip(splits, firsts, strict=False)
            for start in range(0, len(arrays[0]), chunk_rows)
        ]
        random = np.random.default_rng((seed, epoch))
        chunks = [chunks[n] for n in random.permutation(len(chunks))]
        at_once = max(self._buffer_rows // chunk_rows, 1)
        fillings = [chunks[at : at + at_once] for at in range(0, len(chunks), at_once)]
        with ThreadPoolExecutor(1) as reader:
            buffer = reader.submit(self._read, fillings[0])
            for number in range(len(fillings)):
                values, rows = buffer.result()
                last = number + 1 == len(fillings)
                if not last:
                    buffer = reader.submit(self._read, fillings[number + 1])
                order = torch.from_numpy(random.permutation(len(rows)))
                yield Piece(values, order, rows[order], last)

    def _read(self, filling: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Return the features of some chunks, and the rows of the union that they are."""
        values, numbers, at = torch.empty(0), [], 0
        total = sum(stop - start for _, start, stop, _ in filling)
        # In their order on disk; the shuffle comes later.
        for arrays, start, stop, first in sorted(filling, key=lambda chunk: (chunk[3], chunk[1])):
            part = self._input.read(torch.from_numpy(array[start:stop]) for array in arrays)
            if not at:
                values = part.new_empty(total, *part.shape[1:])
            values[at : at + len(part)] = part
            at += len(part)
            numbers.append(torch.arange(first + start, first + stop))
            for array in arrays:
                array.release()
        return values, torch.cat(numbers)
