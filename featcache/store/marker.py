"""Markers: the small files that say that a shard is whole."""

import hashlib

import numpy as np

from featcache.errors import BadInput
from featcache.store.sealed import seal, unseal


def marker_name(split, shard):
    """Name of a shard's marker within the store."""
    return f"commits/{split}/{shard:06d}.json"


def ids_sha256(ids):
    """sha256 (hex) over the ids of a shard's rows, one a line."""
    return hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()


def write_marker(folder, manifest, split, shard, ids, files, digests=None):
    """Write the marker of a shard, last of all: from now on the shard exists.

    ids: of its rows. files: {feature name: {bytes, crc32, offset, rows_crc32c}}, see docs/store-format.md.
    digests: uint8 [rows, 16] of the images, None if they are not known.
    """
    content = {
        "store": manifest.id,
        "split": split,
        "shard": shard,
        "rows": list(manifest.rows_of(split, shard)),
        "ids_sha256": ids_sha256(ids),
        **({} if digests is None else {"images": digests.tobytes().hex()}),
        "files": files,
    }
    with folder.writing(marker_name(split, shard)) as file:
        file.write(seal(content))


def committed(folder, manifest, split):
    """The shards of a split that have a marker, whatever it says: set of int."""
    names = folder.names(f"commits/{split}")
    return {shard for shard in range(manifest.shards(split)) if f"{shard:06d}.json" in names}


def read_marker(folder, manifest, split, shard):
    """Return a shard's marker, or None if the shard is not committed. Raises BadInput if it is damaged."""
    name = marker_name(split, shard)
    try:
        marker = unseal(folder.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BadInput(f"damaged marker {folder}/{name}: {error}; {remedy(folder)}") from None
    if marker["store"] != manifest.id:
        raise BadInput(
            f"marker {folder}/{name} belongs to another store (id {marker['store'][:8]}, this is {manifest.id[:8]}); "
            f"{remedy(folder)}"
        )
    place = (marker["split"], marker["shard"], tuple(marker["rows"]))
    if place != (split, shard, manifest.rows_of(split, shard)) or marker["files"].keys() != manifest.features.keys():
        raise BadInput(f"marker {folder}/{name} is not that of its shard; {remedy(folder)}")
    return marker


def digests_of(marker):
    """Digests of the images of a shard, uint8 [rows, 16], None in a marker from before there were any."""
    if "images" not in marker:
        return None
    first, end = marker["rows"]
    return np.frombuffer(bytes.fromhex(marker["images"]), np.uint8).reshape(end - first, -1)


def remedy(folder):
    """What to do about damage, for the end of an error's line."""
    return f"run featcache verify {folder} --repair, then the same extract again"
