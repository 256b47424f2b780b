"""The two formats of a store. Each is a module with the functions of `Format`."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Protocol

import numpy as np

from featcache.arguments import is_path
from featcache.errors import BadInput
from featcache.store import hdf5_format, zarr_format
from featcache.store.folder import Folder
from featcache.store.manifest import FeatureSpec, Manifest
from featcache.store.records import AxedArrays


class Format(Protocol):
    """What a format's module holds; its functions say what they do."""

    SUFFIX: str

    def shard_name(self, split: str, feature: str, number: int, axes: int) -> str: ...

    def metadata_files(
        self, manifest: Manifest, arrays: Mapping[str, AxedArrays], parts: Sequence[Manifest] = ()
    ) -> dict[str, bytes]: ...

    def write_shard(
        self, file: BinaryIO, rows: np.ndarray, spec: FeatureSpec, shard_rows: int, compression: str | None
    ) -> int: ...

    def shard_bytes(self, spec: FeatureSpec, shard_rows: int, rows: int) -> int: ...

    def view_shard(
        self, data: bytes | mmap.mmap, offset: int, spec: FeatureSpec, shard_rows: int, rows: int
    ) -> np.ndarray: ...

    def read_array(self, read: Callable[[str], bytes], split: str, name: str) -> np.ndarray: ...

    def check_place(self, folder: Folder, compression: str | None) -> None: ...


FORMATS: dict[str, Format] = {"zarr": zarr_format, "hdf5": hdf5_format}


def choose_format(name: str | None, place: object) -> str:
    """Return the name of a format: the given one, else what the suffix of `place` says, else zarr. Raises BadInput."""
    if name is None:
        return "hdf5" if is_path(place) and str(place).endswith((".hdf5", ".h5")) else "zarr"
    if name not in FORMATS:
        raise BadInput(f"unknown format {name!r} (known: {', '.join(FORMATS)})")
    return name


def format_of(manifest: Manifest) -> Format:
    """Return the format of a store."""
    return FORMATS[manifest.storage["format"]]
