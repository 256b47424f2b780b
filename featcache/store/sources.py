"""Rows of one feature of a split, from the shard files: mapped where they are plain bytes, else through zarr."""

import errno
import mmap
import os
import sys
from collections import OrderedDict
from threading import Thread

import numpy as np

from featcache.errors import BadInput
from featcache.store.dtype import STORED, hole
from featcache.store.formats import FORMATS, shard_file
from featcache.store.manifest import feature_of, read_file, remedy
from featcache.store.marker import marker_name, read_marker
from featcache.store.zarr_format import crc_of

# Each mapping holds a file handle; a store may have more shards than a process may have handles.
MAPPED_SHARDS = 128
# Fewer bytes are not worth a thread.
ASIDE_BYTES = 8 << 20
# A kernel may map up to a huge page around the page that is read.
AROUND = 2 << 20


def open_source(folder, manifest, split, feature, ids=None, checked=None):
    """Return the source of a feature's rows, with `take_range`, `fill`, `take` and `release`.

    ids: the ids_sha256 of each shard, which its marker must have; None if that is not to be looked at.
    checked: a dict in which it is remembered which chunks are known to fit their checksums.
    """
    kind = DecodedShards if folder.remote or manifest.storage["compression"] else MappedShards
    return kind(folder, manifest, split, str(feature), ids, {} if checked is None else checked)


def chunk_of(view, number, step, rows):
    """The rows of a chunk from a view [blocks, rows of a block, ...] of a shard of so many rows; step: chunk_rows."""
    block, start = divmod(number * step, view.shape[1])
    return view[block, start : start + min(step, rows - number * step)]


class _Shards:
    def __init__(self, folder, manifest, split, feature, ids, checked):
        self.folder, self.manifest, self.split, self.feature = folder, manifest, split, feature
        self.spec = manifest.features[feature]
        self.row = tuple(self.spec["shape"])
        self.dtype = STORED[self.spec["dtype"]]
        self.shard_rows, self.chunk_rows = manifest.splits[split]["shard_rows"], self.spec["chunk_rows"]
        self._ids, self._checked, self._entries = ids, checked, {}

    def __getstate__(self):
        # Another process looks again at what it reads.
        return self.__dict__ | {"_checked": {}, "_entries": {}}

    @property
    def layout(self):
        """The module of the store's format."""
        return FORMATS[self.manifest.storage["format"]]

    def name(self, shard):
        """Name of a shard's file."""
        return shard_file(self.manifest, self.split, shard, self.feature)

    def entry(self, shard):
        """What the marker says of a shard's file. Raises BadInput if there is no marker, or one for other ids."""
        if shard not in self._entries:
            name = f"{self.folder}/{marker_name(self.split, shard)}"
            marker = read_marker(self.folder, self.manifest, self.split, shard)
            if marker is None:
                raise BadInput(f"{name} is gone: the shard is not committed; {remedy(self.folder)}")
            if self._ids is not None and marker["ids_sha256"] != self._ids[shard]:
                raise BadInput(f"marker {name} was made for other ids; {remedy(self.folder)}")
            self._entries[shard] = marker["files"][self.feature]
        return self._entries[shard]

    def damaged(self, shard, reason):
        """The error for a shard file that cannot be used."""
        return BadInput(f"damaged shard file {self.folder}/{self.name(shard)}: {reason}; {remedy(self.folder)}")

    def _chunks(self, start, stop):
        """Yield (shard, chunk within the shard, first row, end row) of all chunks that rows start to stop touch."""
        row = start
        while row < stop:
            shard, local = divmod(row, self.shard_rows)
            chunk = local // self.chunk_rows
            end = min(self.shard_rows, (chunk + 1) * self.chunk_rows) + shard * self.shard_rows
            yield shard, chunk, shard * self.shard_rows + chunk * self.chunk_rows, min(end, len(self))
            row = end

    def __len__(self):
        return self.manifest.splits[self.split]["rows"]

    def _known(self, shard):
        """For each chunk of a shard, whether it is known to fit its checksum: bytearray."""
        # What was found out about another file of that name does not hold for this one.
        key = shard, self._stamp(shard)
        if key not in self._checked:
            self._checked[key] = bytearray(len(self.entry(shard)["rows_crc32c"]))
        return self._checked[key]

    def _stamp(self, shard):
        """What tells a shard's file from another one of the same name."""
        return None

    def _fits(self, shard, chunk, rows):
        """Compare a chunk's rows with the marker's checksum, once. Raises BadInput that names the rows."""
        known = self._known(shard)
        if not known[chunk]:
            if crc_of(rows) != self.entry(shard)["rows_crc32c"][chunk]:
                first = shard * self.shard_rows + chunk * self.chunk_rows
                raise self.damaged(shard, f"damaged rows {first} to {first + len(rows) - 1} of split {self.split}")
            known[chunk] = 1

    def _check_chunks(self, indices):
        """Check the chunks of rows by their numbers, int [n]."""
        # A chunk never reaches into the next shard, since shard_rows is a multiple of chunk_rows.
        for number in np.unique(indices // self.chunk_rows).tolist():
            shard, local = divmod(number * self.chunk_rows, self.shard_rows)
            if not self._known(shard)[local // self.chunk_rows]:
                start = number * self.chunk_rows
                self.take_range(start, min(start + self.chunk_rows, len(self)))


class MappedShards(_Shards):
    """Shard files mapped into memory; the last used ones stay mapped. Safe to fork and to pickle."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._views, self._stamps = OrderedDict(), {}

    def __getstate__(self):
        return super().__getstate__() | {"_views": OrderedDict(), "_stamps": {}}

    def release(self):
        """Let go of all mappings, so that their pages no longer count as this process's memory."""
        self._views.clear()

    def view(self, shard):
        """A shard as [blocks, rows of a block, ...], read-only; the last block may hold padding."""
        view = self._views.get(shard)
        if view is None:
            view = self._map(shard)
            self._views[shard] = view
            while len(self._views) > MAPPED_SHARDS:
                self._views.popitem(last=False)
        return view

    def _map(self, shard):
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
            return self.layout.view_shard(data, entry, self.spec, self.shard_rows, end - first)
        except ValueError as error:
            raise self.damaged(shard, error) from None

    def _stamp(self, shard):
        self.view(shard)
        return self._stamps[shard]

    def take_range(self, start, stop):
        """Copy rows start to stop. Every chunk that they touch is checked. Raises BadInput for damage."""
        out = np.empty((stop - start, *self.row), dtype=self.dtype)
        for _ in self._filled(out, start):
            pass
        return out

    def fill(self, out, start):
        """Copy rows from `start` on into out [n, ...], checked as in take_range; their pages are let go again."""
        for shard, low, high in self._filled(out, start):
            self._drop(shard, low, high)

    def _filled(self, out, start):
        """Copy and check rows as `fill` does; yield (shard, first row, end row within it) after each shard."""
        stop = start + len(out)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows) if len(out) else 0):
            base, end = self.manifest.rows_of(self.split, shard)
            low, high = max(start, base), min(stop, end)
            view, target = self.view(shard), out[low - start : high - start]
            if target.nbytes < ASIDE_BYTES or all(self._known(shard)):
                _copy(view, low - base, target)
                self._check(shard, low, high, target)
            else:
                # A copy waits for memory, so that a second thread computes checksums meanwhile.
                copy = Thread(target=_copy, args=(view, low - base, target))
                copy.start()
                try:
                    self._check(shard, low, high)
                finally:
                    copy.join()
            yield shard, low - base, high - base

    def _check(self, shard, low, high, copied=None):
        """Check all chunks that rows low to high touch, where they were copied to if that holds the whole chunk."""
        base, end = self.manifest.rows_of(self.split, shard)
        for _, chunk, first, last in self._chunks(low, high):
            if copied is not None and low <= first and last <= high:
                # These bytes are in the processor's cache.
                rows = copied[first - low : last - low]
            else:
                rows = chunk_of(self.view(shard), chunk, self.chunk_rows, end - base)
            self._fits(shard, chunk, rows)

    def _drop(self, shard, low, high):
        """Let go of the pages of a shard's rows low to high; the shard stays mapped."""
        if sys.platform != "linux":
            # Elsewhere advice need not be taken.
            del self._views[shard]
            return
        view = self._views[shard]
        block_rows, (block, row) = view.shape[1], view.strides[:2]
        offset = self.entry(shard)["offset"]
        start, end = (offset + at // block_rows * block + at % block_rows * row for at in (low, high))
        start, end = start // AROUND * AROUND, min(end + AROUND, len(view.base))
        view.base.madvise(mmap.MADV_DONTNEED, start, end - start)

    def take(self, indices, check=False):
        """Copy rows by their numbers, int [n]; check: their chunks first, see take_range."""
        if check:
            self._check_chunks(indices)
        out = np.empty((len(indices), *self.row), dtype=self.dtype)
        shards, local = np.divmod(indices, self.shard_rows)
        for shard in np.unique(shards):
            view = self.view(int(shard))
            if len(view) == 1 and shards[0] == shards[-1] == shard and (shards == shard).all():
                return view[0][local]
            here = np.flatnonzero(shards == shard)
            blocks, within = np.divmod(local[here], view.shape[1])
            out[here] = view[blocks, within]
        return out


def _copy(view, start, out):
    """Copy rows from `start` on of a view [blocks, rows of a block, ...] of a shard into out [n, ...]."""
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


class DecodedShards(_Shards):
    """Compressed or remote shards, read through zarr-python.

    It checks that a chunk fits its own crc32c; that it is the chunk that was written here, the marker says.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._array, self._process, self._there = None, None, set()

    def __getstate__(self):
        return super().__getstate__() | {"_array": None, "_process": None, "_there": set()}

    def release(self):
        """Nothing is held."""

    def _look(self, rows):
        """Raise BadInput if a shard is missing: zarr would show it as NaN."""
        for shard in np.unique(rows // self.shard_rows).tolist():
            if shard not in self._there:
                size, expected = self.folder.size(self.name(shard)), self.entry(shard)["bytes"]
                if size != expected:
                    raise self.damaged(shard, "it is missing" if size is None else f"{size} bytes, not {expected}")
                self._there.add(shard)

    def _open(self):
        """The zarr array."""
        if self._process != os.getpid():
            import zarr

            name = f"{self.split}/{feature_of(self.feature).folder}"
            # With another dtype or shape in it, zarr would read other values.
            read_file(self.folder, self.manifest, f"{name}/zarr.json")
            if self.folder.remote:
                place = zarr.storage.FsspecStore.from_url(f"{self.folder}/{name}", read_only=True)
            else:
                place = self.folder.path / name
            array = zarr.open_array(place, mode="r")
            if array.shape != (len(self), *self.row) or array.dtype != self.dtype:
                raise ValueError(f"{name} is an array {array.dtype} {list(array.shape)}, not as the manifest says")
            self._array, self._process = array, os.getpid()
        return self._array

    def _read(self, rows, select):
        self._look(rows)
        where = f"{self.folder}/{self.split}/{self.feature}"
        try:
            values = select(self._open())
        except BadInput:
            raise
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise BadInput(f"damaged rows of {where}: {error}; {remedy(self.folder)}") from None
        except Exception as error:
            # The service, not the store; each library has exceptions of its own.
            raise BadInput(f"{where} cannot be read: {error}") from None
        first = values.reshape(len(values), -1)[:, 0]
        if (np.isnan(first) | (first == hole(self.spec["dtype"]))).any():
            # A shard may have gone since it was looked at.
            self._there.clear()
            self._look(rows)
        return values

    def take_range(self, start, stop):
        """Copy rows start to stop. Every chunk that they touch is checked. Raises BadInput for damage."""
        if start == stop:
            return np.empty((0, *self.row), self.dtype)
        chunks = list(self._chunks(start, stop))
        low, high = chunks[0][2], chunks[-1][3]
        rows = self._read(np.arange(low, high), lambda array: array[low:high])
        for shard, chunk, first, end in chunks:
            self._fits(shard, chunk, rows[first - low : end - low])
        return rows[start - low : stop - low]

    def fill(self, out, start):
        """Copy rows from `start` on into out [n, ...], checked as in take_range."""
        out[:] = self.take_range(start, start + len(out))

    def take(self, indices, check=False):
        """Copy rows by their numbers, int [n]; check: their chunks first, see take_range."""
        if not len(indices):
            return np.empty((0, *self.row), self.dtype)
        if check:
            self._check_chunks(indices)
        # Sorted and once each, so that no chunk is decoded twice.
        once, back = np.unique(indices, return_inverse=True)
        return self._read(once, lambda array: array.oindex[once])[back]
