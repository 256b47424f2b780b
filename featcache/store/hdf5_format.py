"""A store as HDF5: one file per feature and shard with a contiguous dataset, and index.h5 over all of them.

A file is written once, by one process, and closed: a process that is killed while an HDF5 file is open loses all of it.
Readers map the dataset's bytes at the offset that the marker gives.
"""

import io
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from featcache.errors import BadInput
from featcache.store.additions import part_of
from featcache.store.dtype import STORED, hole
from featcache.store.folder import Folder
from featcache.store.manifest import FeatureSpec, Manifest, feature_of
from featcache.store.records import AxedArrays

if TYPE_CHECKING:
    import h5py

SUFFIX = ".hdf5"
INDEX = "index.h5"
ROWS = "rows"
# Rows begin on a page, if they fill one; else after what HDF5 writes first.
ALIGNMENT, HEADER = 4096, 1400
# By this name netCDF readers, such as xarray, know a dimension that has no coordinates.
DIMENSION = "This is a netCDF dimension but not a netCDF variable. %10d"


def shard_name(split: str, feature: str, number: int, axes: int) -> str:
    """Return the name of a shard's file of a feature. number: of the shard within its split."""
    return f"{split}/{feature_of(feature).folder}/{number:06d}.h5"


def metadata_files(
    manifest: Manifest, arrays: Mapping[str, AxedArrays], parts: Sequence[Manifest] = ()
) -> dict[str, bytes]:
    """Return {"index.h5": bytes}: the small arrays, and each feature as a virtual dataset over its shards.

    arrays: the small arrays of each split and view. parts: those of the store, if it has grown; manifest is then all of
    them merged.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["featcache_id"] = manifest.id
        file.attrs["classes"] = manifest.classes
        for split in manifest.splits:
            group = file.create_group(split)
            for name, (array, axes) in arrays[split].items():
                _name_axes(group, group.create_dataset(name, data=array), axes)
            for name in manifest.features:
                _add_virtual(group, part_of(parts or [manifest], split, name), split, name)
    return {INDEX: buffer.getvalue()}


def _add_virtual(group: "h5py.Group", manifest: Manifest, split: str, name: str) -> None:
    """Add a feature to the group of its split, as a virtual dataset over the files of its shards."""
    import h5py

    feature, spec = feature_of(name), manifest.features[name]
    shape = (manifest.splits[split]["rows"], *spec["shape"])
    virtual = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    # A time in the file would make its bytes differ from run to run.
    virtual.set_obj_track_times(False)
    dtype = STORED[spec["dtype"]]
    virtual.set_fill_value(np.array(hole(spec["dtype"]), dtype))
    for number in range(manifest.shards(split)):
        first, end = manifest.rows_of(split, number)
        space, source = h5py.h5s.create_simple(shape), h5py.h5s.create_simple((end - first, *shape[1:]))
        space.select_hyperslab((first,) + (0,) * (len(shape) - 1), (end - first, *shape[1:]))
        # HDF5 takes a lone % for the beginning of a pattern.
        target = shard_name(split, name, number, len(shape)).replace("%", "%%").encode()
        virtual.set_virtual(space, target, ROWS.encode(), source)
    whole = h5py.h5s.create_simple(shape)
    h5py.h5d.create(group.id, feature.folder.encode(), h5py.h5t.py_create(dtype, logical=True), whole, virtual)
    dataset = group[feature.folder]
    dataset.attrs["dtype"] = spec["dtype"]
    _name_axes(group, dataset, ("row", *feature.axes_of(spec["shape"])))


def _name_axes(group: "h5py.Group", dataset: "h5py.Dataset", axes: Iterable[str]) -> None:
    for number, axis in enumerate(axes):
        if axis not in group:
            scale = group.create_dataset(axis, (dataset.shape[number],), dtype="f4")
            scale.make_scale(DIMENSION % dataset.shape[number])
        dataset.dims[number].attach_scale(group[axis])


def write_shard(file: BinaryIO, rows: np.ndarray, spec: FeatureSpec, shard_rows: int, compression: str | None) -> int:
    """Write rows [n, ...], as they are stored, as one file. Returns the offset of the first row."""
    import h5py

    with h5py.File(file, "w", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as written:
        dataset = written.create_dataset(ROWS, data=np.ascontiguousarray(rows))
        offset: int = dataset.id.get_offset()
        return offset


def shard_bytes(spec: FeatureSpec, shard_rows: int, rows: int) -> int:
    """Return the length of the file of a shard with so many rows."""
    length = rows * math.prod(spec["shape"]) * STORED[spec["dtype"]].itemsize
    return length + (ALIGNMENT if length >= ALIGNMENT else HEADER)


def view_shard(data: bytes | mmap.mmap, offset: int, spec: FeatureSpec, shard_rows: int, rows: int) -> np.ndarray:
    """View the bytes of a shard file as [1, rows, ...]. Raises ValueError if there are too few.

    offset: of the first row, as the marker gives it.
    """
    shape = (1, rows, *spec["shape"])
    if offset + int(np.prod(shape)) * STORED[spec["dtype"]].itemsize > len(data):
        raise ValueError("it is shorter than its rows")
    return np.ndarray(shape, STORED[spec["dtype"]], buffer=data, offset=offset)


def read_array(read: Callable[[str], bytes], split: str, name: str) -> np.ndarray:
    """Read one of the small arrays. Raises ValueError if it is damaged.

    read: returns the bytes of a file of the store.
    """
    import h5py

    try:
        with h5py.File(io.BytesIO(read(INDEX)), "r") as file:
            dataset = file
            for part in (split, name):
                # A link may lead to any file of this machine, and so may a dataset that lies elsewhere.
                if not isinstance(dataset.get(part, getlink=True), h5py.HardLink):
                    raise ValueError(f"{part} is not there, or a link")
                dataset = dataset[part]
            if dataset.is_virtual or dataset.external:
                raise ValueError("its values lie in another file")
            array: np.ndarray = dataset[()]
            return array
    except (OSError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(str(error)) from None


def check_place(folder: Folder, compression: str | None) -> None:
    """Raise BadInput unless the store is to be local and uncompressed."""
    if folder.remote:
        raise BadInput(f"{folder}: a store at a URL is Zarr; use --format zarr, or a local path for HDF5")
    if compression is not None:
        raise BadInput(f"an HDF5 store is not compressed; leave out {compression!r}, or use --format zarr")
