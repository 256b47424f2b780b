"""A feature of a split as an array, a tensor, or a stream of batches."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.feature import Feature
from featcache.store.dtype import read_as, widen
from featcache.store.folder import Folder
from featcache.store.manifest import Manifest
from featcache.store.mapped_rows import MappedRows
from featcache.store.sources import Checked, open_source

if TYPE_CHECKING:
    import torch

# Rows are copied in pieces of about this size where not all are wanted at once.
PIECE_BYTES = 32 << 20


class FeatureArray:
    """A feature of a split, [N, ...]. Nothing is read before it is asked for.

    Slices, integers, integer arrays and boolean masks index the rows as numpy does and return numpy arrays (copies);
    bfloat16 comes as float32, which loses nothing. Only the rows asked for are read. Forked and spawned worker
    processes may use it.

    Slices, and whatever else reads rows in order, check every chunk that they touch against its checksum, once in a
    process, and raise BadInput for damage. Rows picked by number or mask are not checked, since a chunk has up to 256
    rows; `take(numbers, check=True)` checks them.

        features = featcache.open_store("voc.zarr")["train"]["last:pooled"]
        features.shape, features[:10], features[[3, 7]], np.asarray(features)
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str,
        feature: Feature,
        ids: list[str] | None = None,
        checked: Checked | None = None,
    ) -> None:
        spec = manifest.features[str(feature)]
        self.feature = feature
        self.stored_dtype = spec["dtype"]
        self.dtype = read_as(spec["dtype"])
        self.shape = (manifest.splits[split]["rows"], *spec["shape"])
        self.ndim = len(self.shape)
        self.chunk_rows = spec["chunk_rows"]
        self._row_bytes = manifest.row_bytes(feature)
        self._source = open_source(folder, manifest, split, feature, ids, checked)

    def __repr__(self) -> str:
        return f"FeatureArray({str(self.feature)!r}, {list(self.shape)}, {self.stored_dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as they are read."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stored feature is always copied into memory")
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    # A number or an array, as numpy's own types say too.
    def __getitem__(self, key: Any) -> Any:
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

    def _take_slice(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        if step == 1:
            return widen(self._source.take_range(start, max(start, stop)), self.stored_dtype)
        return self._take(np.arange(start, stop, step), check=True)

    def take(self, numbers: Sequence[int] | np.ndarray, check: bool = False) -> np.ndarray:
        """Return rows by their numbers, int [n], negative ones counting from the end: [n, ...], as they are read.

        check: compare the chunks of these rows with their checksums first, unless this process has done so; without it
        damage in them may go unnoticed. Raises IndexError, and BadInput for damage.

            features.take([3, 7, -1], check=True)  # [3, 2048]
        """
        return self._take(np.arange(len(self))[np.asarray(numbers, dtype=np.int64)], check)

    def _take(self, numbers: np.ndarray, check: bool = False) -> np.ndarray:
        return widen(self._source.take(numbers, check), self.stored_dtype)

    def to_torch(self, device: "str | torch.device" = "cpu", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return all rows as a torch tensor, by default of the stored dtype, bfloat16 included.

        It needs memory for the result and one piece of 32 MB. Raises BadInput for damage.

            tensor = features.to_torch("cuda", torch.float32)
        """
        import torch

        stored = getattr(torch, self.stored_dtype)
        out = torch.empty(self.shape, dtype=dtype or stored, device=device)
        for start, stop in self._pieces(PIECE_BYTES):
            piece = torch.from_numpy(self._source.take_range(start, stop))
            out[start:stop] = piece.view(stored)
            self._source.release()
        return out

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) in order, about 32 MB at a time; it holds no more than that in memory."""
        for start, stop in self._pieces(PIECE_BYTES):
            yield start, self[start:stop]
            self._source.release()

    def release(self) -> None:
        """Let go of the files of rows that were read, so that they no longer count as memory; they can be read again."""
        self._source.release()

    def _pieces(self, size: int) -> list[tuple[int, int]]:
        # Whole chunks, so that none is read twice.
        step = max(size // self._row_bytes // self.chunk_rows, 1) * self.chunk_rows
        return [(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def _runs(self, chunks: np.ndarray) -> list[tuple[int, int]]:
        """Return (first row, end row) of chunks by their sorted numbers, neighbours together up to a piece."""
        most, runs = max(PIECE_BYTES // (self._row_bytes * self.chunk_rows), 1), []
        for run in np.split(chunks, np.flatnonzero(np.diff(chunks) != 1) + 1):
            for part in np.split(run, range(most, len(run), most)):
                runs.append((int(part[0]) * self.chunk_rows, min(int(part[-1] + 1) * self.chunk_rows, len(self))))
        return runs

    def batches(
        self, size: int, shuffle: bool = False, seed: int | Sequence[int] = 0, memory: int = 1 << 30
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row numbers int64 [B], rows [B, ...]), every row exactly once; the last batch may be short.

        size: rows of a batch. shuffle: yield the rows in random order. seed: int, or a sequence of ints such as (seed,
        epoch); the same seed gives the same batches. memory: in bytes; the process needs this much, one piece of 32 MB
        and two batches, whatever the size of the store. Raises BadInput for damage.

        If the feature fits into `memory`, every order is equally likely. Its shards, if they are at most 128
        uncompressed local files, are then mapped, all chunks are checked before the first batch of the first epoch, and
        rows are picked where they lie; the pages stay mapped until `release`. Otherwise rows go through a shuffle
        buffer: chunks of neighbouring rows (`chunk_rows`, at most 256) are drawn at random from the whole split until
        they fill `memory`, their rows are shuffled, and the buffer is used up before it is filled again.

            for numbers, rows in features.batches(256, shuffle=True, seed=(0, epoch)):
                loss(head(torch.from_numpy(rows)), labels[numbers])
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
        rows = self._source.checked() if chunks_at_once >= len(chunks) else None
        if rows is not None:
            yield from self._picked(rows, random.permutation(len(self)), size)
            return
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

    def _picked(self, rows: MappedRows, order: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the batches of a split whose rows are all mapped. order: int64 [N]."""
        places = rows.places(np.arange(len(self)))
        for start in range(0, len(order), size):
            taken = order[start : start + size]
            yield taken, widen(rows.take(places[taken]), self.stored_dtype)
