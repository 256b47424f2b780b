"""A store as HDF5: one file per feature and shard with a contiguous dataset, and index.h5 over all of them.

Files are written once, by one process, and closed: an HDF5 file that is open in a killed process is
lost whole. Readers map the dataset's bytes at the offset that the marker gives.
"""

import io

import numpy as np

from featcache.errors import BadInput
from featcache.store.dtype import STORED, hole
from featcache.store.manifest import feature_of

SUFFIX = ".hdf5"
INDEX = "index.h5"
ROWS = "rows"
# Rows begin on a page.
ALIGNMENT = 4096
# What netCDF readers, such as xarray, take for a dimension that has no coordinates.
DIMENSION = "This is a netCDF dimension but not a netCDF variable. %10d"


def shard_name(split, feature, shard, axes):
    """Name of a shard's file."""
    return f"{split}/{feature_of(feature).folder}/{shard:06d}.h5"


def metadata_files(manifest, arrays):
    """Return {"index.h5": bytes}: the small arrays, and each feature as a virtual dataset over its shards.

    arrays: {split: {name: (array, names of its axes)}}.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["featcache_id"] = manifest.id
        file.attrs["classes"] = manifest.classes
        for split, geometry in manifest.splits.items():
            group = file.create_group(split)
            for name, (array, axes) in arrays[split].items():
                _name_axes(group, group.create_dataset(name, data=array), axes)
            for name, spec in manifest.features.items():
                feature = feature_of(name)
                shape = (geometry["rows"], *spec["shape"])
                virtual = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                # A time in the file would make its bytes differ from run to run.
                virtual.set_obj_track_times(False)
                dtype = STORED[spec["dtype"]]
                virtual.set_fill_value(np.array(hole(spec["dtype"]), dtype))
                for shard in range(manifest.shards(split)):
                    first, end = manifest.rows_of(split, shard)
                    space, source = h5py.h5s.create_simple(shape), h5py.h5s.create_simple((end - first, *shape[1:]))
                    space.select_hyperslab((first,) + (0,) * (len(shape) - 1), (end - first, *shape[1:]))
                    # HDF5 takes a lone % for the beginning of a pattern.
                    target = shard_name(split, name, shard, len(shape)).replace("%", "%%").encode()
                    virtual.set_virtual(space, target, ROWS.encode(), source)
                whole = h5py.h5s.create_simple(shape)
                kind = h5py.h5t.py_create(dtype, logical=True)
                h5py.h5d.create(group.id, feature.folder.encode(), kind, whole, virtual)
                dataset = group[feature.folder]
                dataset.attrs["dtype"] = spec["dtype"]
                _name_axes(group, dataset, ("row", *feature.axes))
    return {INDEX: buffer.getvalue()}


def _name_axes(group, dataset, axes):
    for number, axis in enumerate(axes):
        if axis not in group:
            scale = group.create_dataset(axis, (dataset.shape[number],), dtype="f4")
            scale.make_scale(DIMENSION % dataset.shape[number])
        dataset.dims[number].attach_scale(group[axis])


def write_shard(file, rows, spec, shard_rows, compression):
    """Write rows [n, ...], as they are stored, as one file. Returns the offset of the first row."""
    import h5py

    with h5py.File(file, "w", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as written:
        dataset = written.create_dataset(ROWS, data=np.ascontiguousarray(rows))
        return dataset.id.get_offset()


def view_shard(data, entry, spec, shard_rows, rows):
    """View the bytes of a shard file as [1, rows, ...]. Raises ValueError if they are too few."""
    shape = (1, rows, *spec["shape"])
    if entry["offset"] + int(np.prod(shape)) * STORED[spec["dtype"]].itemsize > len(data):
        raise ValueError("it is shorter than its rows")
    return np.ndarray(shape, STORED[spec["dtype"]], buffer=data, offset=entry["offset"])


def read_array(read, split, name):
    """Read one of the small arrays. Raises ValueError if it is damaged.

    read: a function from the name of a file to its bytes.
    """
    import h5py

    try:
        with h5py.File(io.BytesIO(read(INDEX)), "r") as file:
            dataset = file
            for part in (split, name):
                # A link, as a dataset that lies elsewhere, may lead to any file of this machine.
                if not isinstance(dataset.get(part, getlink=True), h5py.HardLink):
                    raise ValueError(f"{part} is not there, or a link")
                dataset = dataset[part]
            if dataset.is_virtual or dataset.external:
                raise ValueError("its values lie in another file")
            return dataset[()]
    except (OSError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(str(error)) from None


def check_place(folder, compression):
    """HDF5 stores are local and uncompressed. Raises BadInput."""
    if folder.remote:
        raise BadInput(f"{folder}: a store at a URL is Zarr; use --format zarr, or a local path for HDF5")
    if compression is not None:
        raise BadInput(f"an HDF5 store is not compressed; leave out {compression!r}, or use --format zarr")
