"""Reading a store at the speed of a memory map."""

from functools import cached_property
from pathlib import Path

import numpy as np
import zarr

from featcache.errors import BadInput, nearest
from featcache.store.manifest import read_manifest
from featcache.store.shard import map_shard, read_marker, shard_path


def open_store(path):
    """Open a finished store for reading: `open_store(p)["train"]["last:pooled"][:]`.

    Raises BadInput if there is no store, it is damaged, or shards are missing (named).
    """
    return Store(path)


class Store:
    """A finished store. Index it by split; see Split. Attributes: path, manifest, id, classes, task."""

    def __init__(self, path):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        self.id = self.manifest.id
        self.classes = tuple(self.manifest.classes)
        self.task = self.manifest.task
        self._splits = {}
        for split in self.manifest.splits:
            markers = [read_marker(self.path, self.manifest, split, n) for n in range(self.manifest.shards(split))]
            missing = [n for n, marker in enumerate(markers) if marker is None]
            if missing:
                first, end = self.manifest.rows_of(split, missing[0])
                raise BadInput(
                    f"store {path} is incomplete: split {split} lacks {len(missing)} of {len(markers)} shards, "
                    f"the first is shard {missing[0]} (rows {first} to {end - 1}); run the same extract again to finish it"
                )
            self._splits[split] = Split(self, split, markers)

    @property
    def splits(self):
        """Names of the splits, in order."""
        return tuple(self._splits)

    def __getitem__(self, split):
        if split not in self._splits:
            raise BadInput(
                f"store {self.path} has no split {split!r}{nearest(split, self.splits)} (it has {', '.join(self.splits)})"
            )
        return self._splits[split]


class Split:
    """One split of a store: its features by name, and its ids, labels, boxes and sizes.

    `split["layer4:spatial"]` is array-like; aliases such as `last:pooled` work too.
    """

    def __init__(self, store, name, markers):
        self.store = store
        self.name = name
        self._markers = markers

    def __len__(self):
        return self.store.manifest.splits[self.name]["rows"]

    def __getitem__(self, feature):
        return FeatureArray(self.store, self.name, self.store.manifest.feature(feature), self._markers)

    def _array(self, name):
        return zarr.open_array(str(self.store.path / self.name / name), mode="r")[:]

    @cached_property
    def ids(self):
        """Ids of the rows: list of str."""
        rows = self._array("ids")
        return [bytes(row).rstrip(b"\0").decode() for row in rows]

    @cached_property
    def labels(self):
        """int8 [N, C] with 1, 0, -1 (only difficult) if multi-label, int64 [N] if single-label."""
        return self._array("labels")

    @cached_property
    def sizes(self):
        """int32 [N, 2]: height and width of the original images in pixels."""
        return self._array("sizes")

    @cached_property
    def boxes(self):
        """For each row (boxes float32 [M, 4] as x0 y0 x1 y1 in pixels, classes [M], difficult [M])."""
        bounds = self._array("box_offsets")[1:-1]
        columns = [np.split(self._array(n), bounds) for n in ("boxes", "box_classes", "box_difficult")]
        return list(zip(*columns, strict=True))


class FeatureArray:
    """A feature of a split, [N, ...], mapped from the shard files; nothing is read before it is asked for.

    Slices, integers, integer arrays and boolean masks index the rows as numpy does and return
    numpy arrays (copies). Further indices apply to the axes of a row.
    """

    def __init__(self, store, split, feature, markers):
        manifest = store.manifest
        spec = manifest.features[str(feature)]
        self.feature = feature
        self.dtype = np.dtype(spec["dtype"])
        self._row = tuple(spec["shape"])
        self.shape = (manifest.splits[split]["rows"], *self._row)
        self.ndim = len(self.shape)
        self._shard_rows = manifest.splits[split]["shard_rows"]
        self._chunk_rows = spec["chunk_rows"]
        self._paths = [shard_path(store.path, split, feature, n, self.ndim) for n in range(len(markers))]
        self._lengths = [marker["files"][str(feature)]["bytes"] for marker in markers]
        self._views = {}

    def __len__(self):
        return self.shape[0]

    @property
    def nbytes(self):
        """Bytes of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _view(self, shard):
        """Mapped shard, [chunks, chunk_rows, ...]."""
        if shard not in self._views:
            self._views[shard] = map_shard(
                self._paths[shard], self._row, self.dtype, self._chunk_rows, self._shard_rows, self._lengths[shard]
            )
        return self._views[shard]

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("a stored feature is always copied into memory")
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def __getitem__(self, key):
        rows, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(rows, slice) and rows.indices(len(self))[2] == 1:
            start, stop, _ = rows.indices(len(self))
            result = self._read_range(start, max(start, stop))
        else:
            indices = np.arange(len(self))[rows]
            result = self._read_rows(np.atleast_1d(indices).reshape(-1)).reshape(*indices.shape, *self._row)
            if indices.ndim == 0:
                return result[rest]
        # The rows are taken already, whatever axes they have become.
        lead = 1 if isinstance(rows, slice) else indices.ndim
        return result[(slice(None),) * lead + rest] if rest else result

    def _read_range(self, start, stop):
        out = np.empty((stop - start, *self._row), dtype=self.dtype)
        row = start
        while row < stop:
            shard, local = divmod(row, self._shard_rows)
            chunk, within = divmod(local, self._chunk_rows)
            view = self._view(shard)
            whole = min(stop - row, self._shard_rows - local) // self._chunk_rows
            if within == 0 and whole:
                # All whole chunks of the shard in one strided copy.
                count = whole * self._chunk_rows
                target = out[row - start : row - start + count].reshape(whole, self._chunk_rows, *self._row)
                np.copyto(target, view[chunk : chunk + whole])
            else:
                count = min(stop - row, self._chunk_rows - within)
                out[row - start : row - start + count] = view[chunk, within : within + count]
            row += count
        return out

    def _read_rows(self, indices):
        out = np.empty((len(indices), *self._row), dtype=self.dtype)
        shards, local = np.divmod(indices, self._shard_rows)
        chunks, within = np.divmod(local, self._chunk_rows)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            out[here] = self._view(int(shard))[chunks[here], within[here]]
        return out
