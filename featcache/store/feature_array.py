"""A feature of a split as an array, a tensor, or a stream of batches."""

import numpy as np

from featcache.store.dtype import read_as, widen
from featcache.store.sources import open_source

# Rows are copied in pieces of about this size where the whole is not wanted at once.
PIECE_BYTES = 32 << 20


class FeatureArray:
    """A feature of a split, [N, ...]; nothing is read before it is asked for.

    Slices, integers, integer arrays and boolean masks index the rows as numpy does and return
    numpy arrays (copies); bfloat16 comes as float32, exactly. Only the rows asked for are read. Safe
    with forked and spawned worker processes.

    Slices and whatever reads rows in order check each chunk that they touch against its checksum, once
    in a process, and raise BadInput for damage. Rows picked by number or mask are not checked, since a
    chunk is up to 256 rows; `take(numbers, check=True)` does.
    """

    def __init__(self, folder, manifest, split, feature, ids=None, checked=None):
        spec = manifest.features[str(feature)]
        self.feature = feature
        self.stored_dtype = spec["dtype"]
        self.dtype = read_as(spec["dtype"])
        self.shape = (manifest.splits[split]["rows"], *spec["shape"])
        self.ndim = len(self.shape)
        self.chunk_rows = spec["chunk_rows"]
        self._row_bytes = manifest.row_bytes(feature)
        self._source = open_source(folder, manifest, split, feature, ids, checked)

    def __repr__(self):
        return f"FeatureArray({str(self.feature)!r}, {list(self.shape)}, {self.stored_dtype})"

    def __len__(self):
        return self.shape[0]

    @property
    def nbytes(self):
        """Bytes of all rows as they are read."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("a stored feature is always copied into memory")
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def __getitem__(self, key):
        rows, *rest = key if isinstance(key, tuple) and key else (key,)
        if isinstance(rows, slice):
            taken = self._take_slice(rows)
            return taken[(slice(None), *rest)] if rest else taken
        if isinstance(rows, (bool, np.bool_, tuple)) or rows is None or rows is Ellipsis:
            # These ask for all rows, whatever else they do to the axes.
            return self._take_slice(slice(None))[key]
        mask = np.asarray(rows)
        if mask.dtype == bool and mask.ndim > 1:
            return self._take_slice(slice(None))[key]
        numbers = np.arange(len(self))[rows]
        if not rest:
            return self._take(numbers.reshape(-1)).reshape(*numbers.shape, *self.shape[1:])
        # The rows asked for, each once, take the place of all rows; then numpy's own rules do the rest.
        once, back = np.unique(numbers.reshape(-1), return_inverse=True)
        return self._take(once)[(int(back[0]) if numbers.ndim == 0 else back.reshape(numbers.shape), *rest)]

    def _take_slice(self, rows):
        start, stop, step = rows.indices(len(self))
        if step == 1:
            return widen(self._source.take_range(start, max(start, stop)), self.stored_dtype)
        return self._take(np.arange(start, stop, step), check=True)

    def take(self, numbers, check=False):
        """Rows by their numbers, int [n], negative ones from the end: [n, ...], as they are read.

        check: compare the chunks of these rows with their checksums first, unless this process has done
        so; otherwise damage in them may go unnoticed. Raises IndexError, and BadInput for damage.
        """
        return self._take(np.arange(len(self))[np.asarray(numbers, dtype=np.int64)], check)

    def _take(self, numbers, check=False):
        return widen(self._source.take(numbers, check), self.stored_dtype)

    def to_torch(self, device="cpu", dtype=None):
        """All rows as a torch tensor, by default of the stored dtype, bfloat16 included.

        Needs memory for the result and one piece of 32 MB.
        """
        import torch

        stored = getattr(torch, self.stored_dtype)
        out = torch.empty(self.shape, dtype=dtype or stored, device=device)
        for start, stop in self._pieces(PIECE_BYTES):
            piece = torch.from_numpy(self._source.take_range(start, stop))
            out[start:stop] = piece.view(stored)
            self._source.release()
        return out

    def pieces(self):
        """Yield (first row, rows) in order, about 32 MB at a time; holds no more than that in memory."""
        for start, stop in self._pieces(PIECE_BYTES):
            yield start, self[start:stop]
            self._source.release()

    def release(self):
        """Let go of the memory of rows that were read; they can be read again."""
        self._source.release()

    def _pieces(self, size):
        # Whole chunks, so that none is read twice.
        step = max(size // self._row_bytes // self.chunk_rows, 1) * self.chunk_rows
        return [(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def _runs(self, chunks):
        """(first row, end row) of chunks by their sorted numbers, neighbours together up to a piece."""
        most, runs = max(PIECE_BYTES // (self._row_bytes * self.chunk_rows), 1), []
        for run in np.split(chunks, np.flatnonzero(np.diff(chunks) != 1) + 1):
            for part in np.split(run, range(most, len(run), most)):
                runs.append((int(part[0]) * self.chunk_rows, min(int(part[-1] + 1) * self.chunk_rows, len(self))))
        return runs

    def batches(self, size, shuffle=False, seed=0, memory=1 << 30):
        """Yield (row numbers int64 [B], rows [B, ...]), every row exactly once; the last batch may be short.

        size: rows of a batch. shuffle: in random order, with a shuffle buffer: chunks of neighbouring
        rows (`chunk_rows`, at most 256) are drawn at random from the whole split until `memory` bytes
        are full, their rows are shuffled, and the buffer is used up before it is filled again. If the
        feature fits into `memory` every order is equally likely. seed: int, or a sequence of ints such
        as (seed, epoch); the same seed gives the same batches. memory: bytes; the process needs these,
        one piece of 32 MB and two batches, whatever the size of the store.
        """
        if size < 1:
            raise ValueError(f"batch size {size} is not positive")
        if not shuffle:
            step = max(PIECE_BYTES // self._row_bytes // size, 1) * size
            for first in range(0, len(self), step):
                piece = self[first : first + step]
                self._source.release()
                for start in range(0, len(piece), size):
                    rows = piece[start : start + size]
                    yield np.arange(first + start, first + start + len(rows)), rows
            return
        random = np.random.default_rng(seed)
        chunks = random.permutation(-(-len(self) // self.chunk_rows))
        chunks_at_once = max(int(memory) // (self._row_bytes * self.chunk_rows), 1)
        room = min(chunks_at_once * self.chunk_rows, len(self)) + size
        numbers, buffer = np.empty(room, np.int64), np.empty((room, *self.shape[1:]), self._source.dtype)
        filled = 0
        for at in range(0, len(chunks), chunks_at_once):
            for start, stop in self._runs(np.sort(chunks[at : at + chunks_at_once])):
                numbers[filled : filled + stop - start] = np.arange(start, stop)
                self._source.fill(buffer[filled : filled + stop - start], start)
                filled += stop - start
            self._source.release()
            order = random.permutation(filled)
            last = at + chunks_at_once >= len(chunks)
            # What does not fill a batch waits for the next filling.
            used = filled if last else filled // size * size
            for start in range(0, used, size):
                taken = order[start : min(start + size, used)]
                yield numbers[taken], widen(buffer[taken], self.stored_dtype)
            rest = order[used:]
            filled = len(rest)
            numbers[:filled], buffer[:filled] = numbers[rest], buffer[rest]
