"""Rows of one feature of a split, from the shard files: mapped where they are plain bytes, else through zarr."""

import errno
import mmap
import os
import zlib
from collections import OrderedDict

import numpy as np

from featcache.errors import BadInput
from featcache.store.dtype import STORED, hole
from featcache.store.formats import FORMATS
from featcache.store.manifest import feature_of
from featcache.store.marker import marker_name, read_marker, remedy

# Each mapping holds a file handle; a store may have more shards than a process may have handles.
MAPPED_SHARDS = 128


def open_source(folder, manifest, split, feature):
    """Return the source of a feature's rows, with `take_range(start, stop)`, `take(indices)` and `release()`."""
    kind = DecodedShards if folder.remote or manifest.storage["compression"] else MappedShards
    return kind(folder, manifest, split, str(feature))


class _Shards:
    def __init__(self, folder, manifest, split, feature):
        self.folder, self.manifest, self.split, self.feature = folder, manifest, split, feature
        self.spec = manifest.features[feature]
        self.row = tuple(self.spec["shape"])
        self.dtype = STORED[self.spec["dtype"]]
        self.shard_rows = manifest.splits[split]["shard_rows"]

    @property
    def layout(self):
        """The module of the store's format."""
        return FORMATS[self.manifest.storage["format"]]

    def name(self, shard):
        """Name of a shard's file."""
        return self.layout.shard_name(self.split, self.feature, shard, 1 + len(self.row))

    def entry(self, shard):
        """What the marker says of a shard's file. Raises BadInput if there is no marker."""
        marker = read_marker(self.folder, self.manifest, self.split, shard)
        if marker is None:
            raise BadInput(f"{self.folder}/{marker_name(self.split, shard)} is gone: the shard is not committed")
        return marker["files"][self.feature]

    def damaged(self, shard, reason):
        """The error for a shard file that cannot be used."""
        return BadInput(f"damaged shard file {self.folder}/{self.name(shard)}: {reason}; {remedy(self.folder)}")


class MappedShards(_Shards):
    """Shard files mapped into memory; the last used ones stay mapped. Safe to fork and to pickle."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._views = OrderedDict()

    def __getstate__(self):
        return self.__dict__ | {"_views": OrderedDict()}

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
            with open(self.folder.path / self.name(shard), "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                if self._views:
                    self.release()
                    return self._map(shard)
                raise BadInput(f"{self.folder}: this process has too many open files; raise ulimit -n") from None
            raise self.damaged(shard, f"cannot be read ({error})") from None
        if len(data) != entry["bytes"]:
            raise self.damaged(shard, f"{len(data)} bytes, its marker says {entry['bytes']}")
        first, end = self.manifest.rows_of(self.split, shard)
        try:
            return self.layout.view_shard(data, entry, self.spec, self.shard_rows, end - first)
        except ValueError as error:
            raise self.damaged(shard, error) from None

    def take_range(self, start, stop):
        """Copy rows start to stop."""
        out = np.empty((stop - start, *self.row), dtype=self.dtype)
        row = start
        while row < stop:
            shard, local = divmod(row, self.shard_rows)
            view = self.view(shard)
            block_rows = view.shape[1]
            block, within = divmod(local, block_rows)
            whole = min(stop - row, self.shard_rows - local) // block_rows
            if within == 0 and whole:
                # All whole blocks of the shard in one strided copy.
                count = whole * block_rows
                target = out[row - start : row - start + count].reshape(whole, block_rows, *self.row)
                np.copyto(target, view[block : block + whole])
            else:
                count = min(stop - row, block_rows - within)
                out[row - start : row - start + count] = view[block, within : within + count]
            row += count
        return out

    def take(self, indices):
        """Copy rows by their numbers, int [n]."""
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


class DecodedShards(_Shards):
    """Compressed or remote shards, read through zarr-python, which checks every chunk's crc32c."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._array, self._process, self._checked = None, None, set()

    def __getstate__(self):
        return self.__dict__ | {"_array": None, "_process": None}

    def release(self):
        """Nothing is held."""

    def _look(self, rows):
        """Raise BadInput if a shard is missing: zarr would show it as NaN."""
        for shard in np.unique(rows // self.shard_rows).tolist():
            if shard not in self._checked:
                size, expected = self.folder.size(self.name(shard)), self.entry(shard)["bytes"]
                if size != expected:
                    raise self.damaged(shard, "it is missing" if size is None else f"{size} bytes, not {expected}")
                self._checked.add(shard)

    def _open(self):
        """The zarr array."""
        if self._process != os.getpid():
            import zarr

            name = f"{self.split}/{feature_of(self.feature).folder}"
            described = f"{name}/zarr.json"
            # With another dtype or shape in it, zarr would read other values.
            if self.folder.size(described) is None:
                raise BadInput(f"missing file {self.folder}/{described}; {remedy(self.folder)}")
            if zlib.crc32(self.folder.read(described)) != self.manifest.files[described]["crc32"]:
                raise BadInput(f"damaged file {self.folder}/{described}; {remedy(self.folder)}")
            if self.folder.remote:
                place = zarr.storage.FsspecStore.from_url(f"{self.folder}/{name}", read_only=True)
            else:
                place = self.folder.path / name
            self._array, self._process = zarr.open_array(place, mode="r"), os.getpid()
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
            self._checked.clear()
            self._look(rows)
        return values

    def take_range(self, start, stop):
        """Copy rows start to stop."""
        if start == stop:
            return np.empty((0, *self.row), self.dtype)
        return self._read(np.arange(start, stop), lambda array: array[start:stop])

    def take(self, indices):
        """Copy rows by their numbers, int [n]."""
        if not len(indices):
            return np.empty((0, *self.row), self.dtype)
        # Sorted and once each, so that no chunk is decoded twice.
        once, back = np.unique(indices, return_inverse=True)
        return self._read(once, lambda array: array.oindex[once])[back]
