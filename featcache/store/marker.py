"""Markers: the small files that say that a shard is whole."""

import hashlib
import json
import re

import numpy as np

from featcache.errors import BadInput
from featcache.store.manifest import remedy
from featcache.store.manifest_fields import COMMITS
from featcache.store.sealed import seal, unseal

# Byte n of this file is the lock of the n-th shard.
LOCK = f"{COMMITS}/lock"
# The first bytes of the sha256 of an image's file.
DIGEST_BYTES = 16


def marker_name(split, shard):
    """Name of a shard's marker within the store."""
    return f"{COMMITS}/{split}/{shard:06d}.json"


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
    names = folder.names(f"{COMMITS}/{split}")
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
    if isinstance(marker.get("store"), str) and marker["store"] != manifest.id:
        raise BadInput(
            f"marker {folder}/{name} belongs to another store (id {marker['store'][:8]}, this is {manifest.id[:8]}); "
            f"{remedy(folder)}"
        )
    if not _is_of(marker, manifest, split, shard):
        raise BadInput(f"marker {folder}/{name} is not that of its shard; {remedy(folder)}")
    return marker


def committed_marker(folder, manifest, split, shard):
    """Return a shard's marker. Raises BadInput if it is damaged, or if there is none."""
    marker = read_marker(folder, manifest, split, shard)
    if marker is None:
        name = f"{folder}/{marker_name(split, shard)}"
        raise BadInput(f"{name} is gone: the shard is not committed; {remedy(folder)}")
    return marker


def _is_of(marker, manifest, split, shard):
    """Whether a marker has all that the marker of a shard has, of the right types."""
    rows = manifest.rows_of(split, shard)
    place = {"store": manifest.id, "split": split, "shard": shard, "rows": list(rows)}
    count, files = rows[1] - rows[0], marker.get("files")
    # As JSON, in which true is not 1.
    if json.dumps({field: marker.get(field) for field in place}) != json.dumps(place):
        return False
    if not isinstance(files, dict) or files.keys() != manifest.features.keys():
        return False
    if not _is_hex(marker.get("ids_sha256"), 32):
        return False
    if "images" in marker and not _is_hex(marker["images"], DIGEST_BYTES * count):
        return False
    for name, entry in files.items():
        chunks = -(-count // manifest.features[name]["chunk_rows"])
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "crc32", "offset", "rows_crc32c"}:
            return False
        crcs = entry["rows_crc32c"]
        if not isinstance(crcs, list) or len(crcs) != chunks:
            return False
        numbers = (entry["bytes"], entry["crc32"], entry["offset"], *crcs)
        if any(type(number) is not int or number < 0 for number in numbers) or entry["offset"] > entry["bytes"]:
            return False
    return True


def _is_hex(text, length):
    return isinstance(text, str) and len(text) == 2 * length and re.fullmatch("[0-9a-f]*", text) is not None


def ids_sha256_of(array, rows):
    """ids_sha256 of the shards of a split, list of str; array: its ids, uint8 [N, L], rows: (first, end) of each."""
    lengths = np.where(array.any(1), array.shape[1] - np.argmax(array[:, ::-1] != 0, axis=1), 0)
    lines = np.concatenate([array, np.full((len(array), 1), ord("\n"), np.uint8)], axis=1)
    kept = np.arange(lines.shape[1]) < lengths[:, None]
    kept[:, -1] = True
    return [hashlib.sha256(lines[a:b][kept[a:b]].tobytes()).hexdigest() for a, b in rows]


def digests_of(marker):
    """Digests of the images of a shard, uint8 [rows, 16], None in a marker from before there were any."""
    if "images" not in marker:
        return None
    first, end = marker["rows"]
    return np.frombuffer(bytes.fromhex(marker["images"]), np.uint8).reshape(end - first, -1)
