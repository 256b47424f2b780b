"""One shard of one feature as bytes: a Zarr v3 sharded chunk, and the marker that commits it.

A shard file is its inner chunks one after another, each followed by the crc32c of its bytes, then
the index (offset and length of every inner chunk, uint64) and the crc32c of the index.
"""

import hashlib
import json
import mmap
from pathlib import Path

import google_crc32c
import numpy as np

from featcache.atomic import replacing, sync_folder, write_whole
from featcache.errors import BadInput

CRC_BYTES = 4
ABSENT = 2**64 - 1


def shard_path(store, split, feature, shard, axes):
    """Path of a shard file; axes: number of axes of the array, rows included."""
    return Path(store, split, feature.folder, "c", str(shard), *["0"] * (axes - 1))


def marker_path(store, split, shard):
    """Path of the marker that says that a shard is whole."""
    return Path(store, "commits", split, f"{shard:06d}.json")


def _crc(data):
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def write_shard(path, rows, chunk_rows, shard_rows):
    """Write rows [n, ...] as one shard file, durably and all or nothing.

    Returns {"bytes": length, "sha256": hex} for the marker. The last inner chunk is padded with
    NaN; inner chunks beyond the rows are absent.
    """
    digest = hashlib.sha256()
    index = np.full((shard_rows // chunk_rows, 2), ABSENT, dtype="<u8")
    offset = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:

        def put(data):
            digest.update(data)
            file.write(data)
            return len(data) if isinstance(data, bytes) else data.nbytes

        for number, start in enumerate(range(0, len(rows), chunk_rows)):
            chunk = rows[start : start + chunk_rows]
            if len(chunk) < chunk_rows:
                padded = np.full((chunk_rows, *rows.shape[1:]), np.nan, dtype=rows.dtype)
                padded[: len(chunk)] = chunk
                chunk = padded
            chunk = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            chunk.flags.writeable = False
            length = put(chunk) + put(_crc(chunk))
            index[number] = offset, length
            offset += length
        tail = index.tobytes()
        offset += put(tail) + put(_crc(tail))
    for folder in path.parents[1 : rows.ndim + 1]:
        sync_folder(folder)
    return {"bytes": offset, "sha256": digest.hexdigest()}


def commit_shard(store, split, shard, rows, ids_sha256, files):
    """Write the marker of a shard, last of all: from now on the shard exists.

    rows: (first, end). files: {feature name: what write_shard returned}.
    """
    content = {"split": split, "shard": shard, "rows": list(rows), "ids_sha256": ids_sha256, "files": files}
    write_whole(marker_path(store, split, shard), json.dumps(content, indent=1) + "\n")


def read_marker(store, manifest, split, shard):
    """Return a shard's marker, or None if the shard is not committed. Raises BadInput if damaged."""
    path = marker_path(store, split, shard)
    try:
        marker = json.loads(path.read_bytes())
        lengths = {name: int(file["bytes"]) for name, file in marker["files"].items()}
        place = (marker["split"], marker["shard"], tuple(marker["rows"]))
        if lengths.keys() == manifest.features.keys() and place == (split, shard, manifest.rows_of(split, shard)):
            return marker
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BadInput(f"damaged marker {path}: delete it and run the same extract again to refill the shard")


def map_shard(path, shape, dtype, chunk_rows, shard_rows, length):
    """Map a shard file: a read-only view [chunks, chunk_rows, *shape] without a copy.

    shape: of one row. length: bytes that the marker promises. The last chunk may hold padding.
    Raises BadInput if the file is missing, has another length, or an index that does not fit it.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BadInput(f"shard file {path} cannot be read: {error}") from None
    if len(data) != length:
        raise BadInput(f"damaged shard file {path}: {len(data)} bytes, its marker says {length}")
    entries = shard_rows // chunk_rows
    index_start = length - entries * 16 - CRC_BYTES
    stride = chunk_rows * int(np.prod(shape)) * np.dtype(dtype).itemsize + CRC_BYTES
    present = index_start // stride
    index = np.frombuffer(data, dtype="<u8", count=entries * 2, offset=index_start).reshape(entries, 2)
    # Our writer lays the chunks one after another; anything else is damage.
    expected = np.full((entries, 2), ABSENT, dtype="<u8")
    expected[:present, 0] = np.arange(present) * stride
    expected[:present, 1] = stride
    if not np.array_equal(index, expected):
        raise BadInput(f"damaged shard file {path}: its index does not fit its length")
    row_strides = np.empty((chunk_rows, *shape), dtype=dtype).strides
    return np.ndarray((present, chunk_rows, *shape), dtype, buffer=data, strides=(stride, *row_strides))
