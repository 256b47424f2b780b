"""The rows of one feature of a split, from the shard files: mapped where they are plain bytes, else through zarr."""

import errno
import mmap
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import numpy as np

from featcache.errors import BadInput
from featcache.store.additions import read_file
from featcache.store.dtype import STORED, hole
from featcache.store.folder import Folder, LocalFolder
from featcache.store.formats import Format, format_of
from featcache.store.manifest import Manifest, feature_of, remedy
from featcache.store.mapped_rows import MappedRows, chunk_of, copy_rows
from featcache.store.marker import ShardFile, read_marker
from featcache.store.shard import Shard
from featcache.store.zarr_format import crc_of

# Each mapping holds a file handle; a store may have more shards than a process may have handles.
MAPPED_SHARDS = 128
# Fewer bytes are not worth a thread.
ASIDE_BYTES = 8 << 20
# A kernel may map up to a huge page around the page that is read.
AROUND = 2 << 20

# For each shard's file, by shard and stamp, which of its chunks are known to fit their checksums.
Checked = dict[tuple[int, object], bytearray]


def open_source(
    folder: Folder,
    manifest: Manifest,
    split: str,
    feature: object,
    ids: list[str] | None = None,
    checked: Checked | None = None,
) -> "MappedShards | DecodedShards":
    """Return the source of a feature's rows, with `take_range`, `fill`, `take`, `checked` and `release`.

    ids: the ids_sha256 that the marker of each shard must have; None leaves it unchecked.
    checked: remembers what is known to fit its checksum.
    """
    source = DecodedShards if folder.remote or manifest.storage["compression"] else MappedShards
    return source(folder, manifest, split, str(feature), ids, {} if checked is None else checked)


class _Shards:
    """The shards of a split, as far as they hold one feature.

    Here a shard is given by its number within the split, and a chunk by its number within the shard.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str,
        feature: str,
        ids: list[str] | None,
        checked: Checked,
    ) -> None:
        self.folder, self.manifest, self.split, self.feature = folder, manifest, split, feature
        self.spec = manifest.features[feature]
        self.row = tuple(self.spec["shape"])
        self.dtype = STORED[self.spec["dtype"]]
        self.shard_rows, self.chunk_rows = manifest.splits[split]["shard_rows"], self.spec["chunk_rows"]
        self._ids, self._checked = ids, checked
        self._entries: dict[int, ShardFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process checks again what it reads.
        return self.__dict__ | {"_checked": {}, "_entries": {}}

    @property
    def layout(self) -> Format:
        """The module of the store's format."""
        return format_of(self.manifest)

    def _shard(self, shard: int) -> Shard:
        return Shard(self.folder, self.manifest, self.split, shard)

    def name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return self._shard(shard).file_name(self.feature)

    def entry(self, shard: int) -> ShardFile:
        """Return what the marker says about a shard's file. Raises BadInput if it is gone, or was made for other ids."""
        if shard not in self._entries:
            marker = read_marker(self._shard(shard))
            if self._ids is not None and marker["ids_sha256"] != self._ids[shard]:
                name = f"{self.folder}/{self._shard(shard).marker_name}"
                raise BadInput(f"marker {name} was made for other ids; {remedy(self.folder)}")
            self._entries[shard] = marker["files"][self.feature]
        return self._entries[shard]

    def damaged(self, shard: int, reason: object) -> BadInput:
        """Return the error for a shard file that cannot be used."""
        return BadInput(f"damaged shard file {self.folder}/{self.name(shard)}: {reason}; {remedy(self.folder)}")

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, chunk, first row, end row) of all chunks that rows start to stop touch."""
        row = start
        while row < stop:
            shard, local = divmod(row, self.shard_rows)
            chunk = local // self.chunk_rows
            end = min(self.shard_rows, (chunk + 1) * self.chunk_rows) + shard * self.shard_rows
            yield shard, chunk, shard * self.shard_rows + chunk * self.chunk_rows, min(end, len(self))
            row = end

    def __len__(self) -> int:
        return self.manifest.splits[self.split]["rows"]

    def take_range(self, start: int, stop: int) -> np.ndarray:
        """Copy rows start to stop. Every chunk that they touch is checked. Raises BadInput for damage."""
        raise NotImplementedError

    def _known(self, shard: int) -> bytearray:
        """Return for each chunk of a shard whether it is known to fit its checksum."""
        # What is known about another file of that name does not hold for this one.
        key = shard, self._stamp(shard)
        if key not in self._checked:
            self._checked[key] = bytearray(len(self.entry(shard)["rows_crc32c"]))
        return self._checked[key]

    def _stamp(self, shard: int) -> object:
        """Return what distinguishes a shard's file from another one of the same name."""
        return None

    def _fits(self, shard: int, chunk: int, rows: np.ndarray) -> None:
        """Compare a chunk's rows with the marker's checksum, once. Raises BadInput, which names the rows."""
        known = self._known(shard)
        if not known[chunk]:
            if crc_of(rows) != self.entry(shard)["rows_crc32c"][chunk]:
                first = shard * self.shard_rows + chunk * self.chunk_rows
                raise self.damaged(shard, f"damaged rows {first} to {first + len(rows) - 1} of split {self.split}")
            known[chunk] = 1

    def _check_chunks(self, indices: np.ndarray) -> None:
        """Check the chunks of some rows, given by their numbers, int [n]."""
        # A chunk never reaches into the next shard, since shard_rows is a multiple of chunk_rows.
        for number in np.unique(indices // self.chunk_rows).tolist():
            shard, local = divmod(number * self.chunk_rows, self.shard_rows)
            if not self._known(shard)[local // self.chunk_rows]:
                start = number * self.chunk_rows
                self.take_range(start, min(start + self.chunk_rows, len(self)))


class MappedShards(_Shards):
    """Shard files mapped into memory; those used last stay mapped. Safe to fork and to pickle."""

    folder: LocalFolder

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._views: OrderedDict[int, np.ndarray] = OrderedDict()
        self._stamps: dict[int, tuple[int, int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_views": OrderedDict(), "_stamps": {}}

    def release(self) -> None:
        """Unmap all shards, so that their pages no longer count as this process's memory."""
        self._views.clear()

    def view(self, shard: int) -> np.ndarray:
        """Return a shard as [blocks, rows of a block, ...], read-only; the last block may hold padding."""
        view = self._views.get(shard)
        if view is None:
            view = self._map(shard)
            self._views[shard] = view
            while len(self._views) > MAPPED_SHARDS:
                self._views.popitem(last=False)
        return view

    def _map(self, shard: int) -> np.ndarray:
        entry = self.entry(shard)
        try:
            with open(self.folder.file(self.name(shard)), "rb") as file:
                data, status = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                if self._views:
                    self.release()
                    return self._map(shard)
                raise BadInput(f"{self.folder}: this process has too many open files; raise ulimit -n") from None
            raise self.damaged(shard, f"cannot be read ({error})") from None
        if len(data) != entry["bytes"]:
            raise self.damaged(shard, f"{len(data)} bytes, its marker says {entry['bytes']}")
        self._stamps[shard] = (status.st_ino, status.st_size, status.st_mtime_ns)
        first, end = self.manifest.rows_of(self.split, shard)
        try:
            return self.layout.view_shard(data, entry["offset"], self.spec, self.shard_rows, end - first)
        except ValueError as error:
            raise self.damaged(shard, error) from None

    def _stamp(self, shard: int) -> object:
        self.view(shard)
        return self._stamps[shard]

    def take_range(self, start: int, stop: int) -> np.ndarray:
        """Copy rows start to stop. Every chunk that they touch is checked. Raises BadInput for damage."""
        out = np.empty((stop - start, *self.row), dtype=self.dtype)
        for _ in self._filled(out, start):
            pass
        return out

    def fill(self, out: np.ndarray, start: int) -> None:
        """Copy rows from `start` on into out [n, ...], checked as in take_range, and let go of their pages."""
        for shard, low, high in self._filled(out, start):
            self._drop(shard, low, high)

    def _filled(self, out: np.ndarray, start: int) -> Iterator[tuple[int, int, int]]:
        """Copy and check rows as `fill` does; yield (shard, first row, end row within it) after each shard."""
        stop = start + len(out)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows) if len(out) else 0):
            base, end = self.manifest.rows_of(self.split, shard)
            low, high = max(start, base), min(stop, end)
            view, target = self.view(shard), out[low - start : high - start]
            if target.nbytes < ASIDE_BYTES or all(self._known(shard)):
                copy_rows(view, low - base, target)
                self._check(shard, low, high, target)
            else:
                # The copy waits for memory; this thread computes checksums meanwhile.
                copy = Thread(target=copy_rows, args=(view, low - base, target))
                copy.start()
                try:
                    self._check(shard, low, high)
                finally:
                    copy.join()
            yield shard, low - base, high - base

    def _check(self, shard: int, low: int, high: int, copied: np.ndarray | None = None) -> None:
        """Check all chunks that rows low to high touch.

        copied: a copy of these rows. A chunk that lies in it whole is checked there, where it is in the processor's cache.
        """
        base, end = self.manifest.rows_of(self.split, shard)
        for _, chunk, first, last in self._chunks(low, high):
            if copied is not None and low <= first and last <= high:
                rows = copied[first - low : last - low]
            else:
                rows = chunk_of(self.view(shard), chunk, self.chunk_rows, end - base)
            self._fits(shard, chunk, rows)

    def _drop(self, shard: int, low: int, high: int) -> None:
        """Let go of the pages of a shard's rows low to high; the shard stays mapped."""
        if sys.platform != "linux":
            # Other systems may ignore the advice.
            del self._views[shard]
            return
        view = self._views[shard]
        block_rows, (block, row) = view.shape[1], view.strides[:2]
        offset = self.entry(shard)["offset"]
        start, end = (offset + at // block_rows * block + at % block_rows * row for at in (low, high))
        # The bytes that a view lies in are the mapped file.
        data: Any = view.base
        start, end = start // AROUND * AROUND, min(end + AROUND, len(data))
        data.madvise(mmap.MADV_DONTNEED, start, end - start)

    def take(self, indices: np.ndarray, check: bool = False) -> np.ndarray:
        """Copy rows by their numbers, int [n]. check: check their chunks first, as take_range does."""
        if check:
            self._check_chunks(indices)
        shards = indices // self.shard_rows
        touched = np.unique(shards).tolist()
        together = self._together(touched)
        if together is not None:
            return together.take(together.places(indices))
        out = np.empty((len(indices), *self.row), dtype=self.dtype)
        for shard in touched:
            here = np.flatnonzero(shards == shard)
            rows = MappedRows({shard: self.view(shard)}, self.shard_rows)
            out[here] = rows.take(rows.places(indices[here]))
        return out

    def _together(self, shards: Sequence[int]) -> MappedRows | None:
        """Map shards all at once; None if there are none, or too many."""
        if not 0 < len(shards) <= MAPPED_SHARDS:
            return None
        for shard in shards:
            self.view(shard)
        # Some are gone again if this process ran out of file handles.
        if not all(shard in self._views for shard in shards):
            return None
        return MappedRows({shard: self._views[shard] for shard in shards}, self.shard_rows)

    def checked(self) -> MappedRows | None:
        """Map all shards, check every chunk where it lies, and return all rows; None if the shards are too many for that.

        Raises BadInput for damage. The pages that are read count as this process's memory until `release`, but they are
        those of the page cache, and the system takes them back when it needs memory.
        """
        shards = range(self.manifest.shards(self.split))
        rows = self._together(shards)
        if rows is not None:
            for shard in shards:
                if not all(self._known(shard)):
                    self._check(shard, *self.manifest.rows_of(self.split, shard))
        return rows


class DecodedShards(_Shards):
    """Compressed or remote shards, read through zarr-python.

    zarr-python checks that a chunk fits its own crc32c; the marker says whether it is the chunk that was written here.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._array: Any = None
        self._process: int | None = None
        self._present: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_array": None, "_process": None, "_present": set()}

    def release(self) -> None:
        """Do nothing: nothing is held."""

    def _check_presence(self, rows: np.ndarray) -> None:
        """Raise BadInput if the shard of one of the rows is missing: zarr would show it as NaN."""
        for shard in np.unique(rows // self.shard_rows).tolist():
            if shard not in self._present:
                size, expected = self.folder.size(self.name(shard)), self.entry(shard)["bytes"]
                if size != expected:
                    raise self.damaged(shard, "it is missing" if size is None else f"{size} bytes, not {expected}")
                self._present.add(shard)

    def _open(self) -> Any:
        """Return the zarr array, opened by this process."""
        if self._process != os.getpid():
            import zarr

            name = f"{self.split}/{feature_of(self.feature).folder}"
            # With another dtype or shape in it, zarr would read other values.
            read_file(self.folder, self.manifest, f"{name}/zarr.json")
            if self.folder.remote:
                place: Any = zarr.storage.FsspecStore.from_url(f"{self.folder}/{name}", read_only=True)
            else:
                place = self.folder.path / name
            array = zarr.open_array(place, mode="r")
            if array.shape != (len(self), *self.row) or array.dtype != self.dtype:
                raise ValueError(f"{name} is an array {array.dtype} {list(array.shape)}, not as the manifest says")
            self._array, self._process = array, os.getpid()
        return self._array

    def _read(self, rows: np.ndarray, select: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Return `select(array)` of the zarr array, which reads these rows. Raises BadInput for damage."""
        self._check_presence(rows)
        where = f"{self.folder}/{self.split}/{self.feature}"
        try:
            values = select(self._open())
        except BadInput:
            raise
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise BadInput(f"damaged rows of {where}: {error}; {remedy(self.folder)}") from None
        except Exception as error:
            # The service failed, not the store; each library has exceptions of its own.
            raise BadInput(f"{where} cannot be read: {error}") from None
        first = values.reshape(len(values), -1)[:, 0]
        if (np.isnan(first) | (first == hole(self.spec["dtype"]))).any():
            # A shard may have been deleted since.
            self._present.clear()
            self._check_presence(rows)
        return values

    def take_range(self, start: int, stop: int) -> np.ndarray:
        """Copy rows start to stop. Every chunk that they touch is checked. Raises BadInput for damage."""
        if start == stop:
            return np.empty((0, *self.row), self.dtype)
        chunks = list(self._chunks(start, stop))
        low, high = chunks[0][2], chunks[-1][3]
        rows = self._read(np.arange(low, high), lambda array: array[low:high])
        for shard, chunk, first, end in chunks:
            self._fits(shard, chunk, rows[first - low : end - low])
        return rows[start - low : stop - low]

    def fill(self, out: np.ndarray, start: int) -> None:
        """Copy rows from `start` on into out [n, ...], checked as in take_range."""
        out[:] = self.take_range(start, start + len(out))

    def checked(self) -> None:
        """Return None: no shard is mapped."""

    def take(self, indices: np.ndarray, check: bool = False) -> np.ndarray:
        """Copy rows by their numbers, int [n]. check: check their chunks first, as take_range does."""
        if not len(indices):
            return np.empty((0, *self.row), self.dtype)
        if check:
            self._check_chunks(indices)
        # Sorted and once each, so that no chunk is decoded twice.
        once, back = np.unique(indices, return_inverse=True)
        return self._read(once, lambda array: array.oindex[once])[back]
