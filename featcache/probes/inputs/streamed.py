"""Training features that are read anew in every epoch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featcache.probes.inputs.batches import Piece
from featcache.probes.inputs.input import Input, all_alike, rows_within
from featcache.store.feature_array import FeatureArray
from featcache.store.reader import Store


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Neighbouring rows of the arrays of a split, from `start` to `stop`, and which of them to read, counted from start.

    place: how many rows to read lie before these in the union.
    """

    arrays: list[FeatureArray]
    start: int
    stop: int
    rows: np.ndarray
    place: int


class Streamed:
    """An input from a union of splits that is read once in every epoch, through a shuffle buffer.

    Chunks of neighbouring rows are drawn at random from all splits until the buffer is full, and its rows are shuffled.
    The next buffer is read while training uses this one. The order of the rows depends on buffer_rows as well as on
    seed and epoch, so buffer_rows is part of a run. rows: sorted rows of the union, int64 [n], by default all; the rows
    of a Piece then count within these.
    """

    def __init__(
        self,
        input: Input,
        store: Store,
        splits: Sequence[str],
        buffer_rows: int,
        rows: np.ndarray | None = None,
    ):
        self._input, self._store, self._splits, self._buffer_rows = input, store, splits, buffer_rows
        self._rows = rows

    def pieces(self, view: int, seed: int, epoch: int) -> Iterator[Piece]:
        """Yield the Pieces of an epoch; every row is in exactly one."""
        splits = [self._input.arrays(self._store[name].view(view)) for name in self._splits]
        # Powers of two, so that the largest is made of whole chunks of all features.
        chunk_rows = max(array.chunk_rows for array in splits[0])
        chunks = self._chunks(splits, chunk_rows)
        random = np.random.default_rng((seed, epoch))
        chunks = [chunks[n] for n in random.permutation(len(chunks))]
        most = chunk_rows if self._rows is None else max(len(chunk.rows) for chunk in chunks)
        at_once = max(self._buffer_rows // most, 1)
        fillings = [chunks[at : at + at_once] for at in range(0, len(chunks), at_once)]
        with ThreadPoolExecutor(1) as reader:
            buffer, alike, first = reader.submit(self._read, fillings[0]), True, None
            for number in range(len(fillings)):
                values, rows = buffer.result()
                first = values[0].clone() if first is None else first
                alike = alike and all_alike(values, first)
                last = number + 1 == len(fillings)
                if not last:
                    buffer = reader.submit(self._read, fillings[number + 1])
                order = torch.from_numpy(random.permutation(len(rows)))
                yield Piece(values, order, rows[order], last)
        if alike and sum(len(chunk.rows) for chunk in chunks) > 1:
            raise self._input.constant(self._splits)

    def _chunks(self, splits: Sequence[list[FeatureArray]], chunk_rows: int) -> list[_Chunk]:
        """Return the chunks of a union of splits that hold rows to read, in their order on disk."""
        chunks: list[_Chunk] = []
        first, place = 0, 0
        for arrays in splits:
            count = len(arrays[0])
            for start in range(0, count, chunk_rows):
                stop = min(start + chunk_rows, count)
                rows = np.arange(stop - start)
                if self._rows is not None:
                    rows = rows_within(self._rows, first + start, first + stop)
                if len(rows):
                    chunks.append(_Chunk(arrays, start, stop, rows, place))
                place += len(rows)
            first += count
        return chunks

    def _read(self, filling: list[_Chunk]) -> tuple[Tensor, Tensor]:
        """Return the features of some chunks, and which of the rows to read they are."""
        values, numbers, at = torch.empty(0), [], 0
        total = sum(len(chunk.rows) for chunk in filling)
        # In their order on disk; the shuffle comes later.
        for chunk in sorted(filling, key=lambda chunk: chunk.place):
            pieces = (array[chunk.start : chunk.stop] for array in chunk.arrays)
            part = self._input.read(torch.from_numpy(p if self._rows is None else p[chunk.rows]) for p in pieces)
            numbers.append(torch.arange(chunk.place, chunk.place + len(part)))
            rows = numbers[-1].numpy() if self._rows is None else self._rows[numbers[-1].numpy()]
            self._input.check_finite(part, self._store, self._splits, rows)
            if not at:
                values = part.new_empty(total, *part.shape[1:])
            values[at : at + len(part)] = part
            at += len(part)
            for array in chunk.arrays:
                array.release()
        return values, torch.cat(numbers)
