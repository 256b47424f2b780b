"""The two formats of a store. Each is a module with the same functions."""

from featcache.arguments import is_path
from featcache.errors import BadInput
from featcache.store import hdf5_format, zarr_format

FORMATS = {"zarr": zarr_format, "hdf5": hdf5_format}


def choose_format(name, place):
    """Return the name of a format: the given one, else what the suffix of `place` says, else zarr."""
    if name is None:
        return "hdf5" if is_path(place) and str(place).endswith((".hdf5", ".h5")) else "zarr"
    if name not in FORMATS:
        raise BadInput(f"unknown format {name!r} (known: {', '.join(FORMATS)})")
    return name


def shard_file(manifest, split, shard, feature):
    """Name of the file that holds a feature of a shard."""
    axes = 1 + len(manifest.features[feature]["shape"])
    return FORMATS[manifest.storage["format"]].shard_name(split, feature, shard, axes)
