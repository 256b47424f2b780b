"""Markers: the small files that say that a shard is whole."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from featcache.digest import DIGEST_BYTES
from featcache.errors import BadInput
from featcache.names import COMMITS
from featcache.store.folder import Folder
from featcache.store.manifest import Manifest, remedy
from featcache.store.records import ids_array
from featcache.store.sealed import seal, unseal
from featcache.store.shard import Shard

# Byte n of this file is the lock of the n-th shard.
LOCK = f"{COMMITS}/lock"


class ShardFile(TypedDict):
    """What a marker says about the file of a feature; see docs/store-format.md."""

    bytes: int
    crc32: int
    offset: int
    rows_crc32c: list[int]


class Marker(TypedDict):
    """The contents of a marker; see docs/store-format.md. Markers of early versions lack `images`."""

    store: str
    split: str
    shard: int
    rows: list[int]
    ids_sha256: str
    images: NotRequired[str]
    files: dict[str, ShardFile]


def ids_sha256(ids: np.ndarray) -> str:
    """Return the sha256 (hex) of the ids of a shard, one a line. ids: uint8 [n, L], padded with zero bytes."""
    lines = np.full((len(ids), ids.shape[1] + 1), ord("\n"), np.uint8)
    lines[:, :-1] = ids
    kept = np.ones(lines.shape, bool)
    # A byte is padding unless it, or a byte to its right, is not zero.
    kept[:, :-1] = np.logical_or.accumulate(ids[:, ::-1] != 0, axis=1)[:, ::-1]
    return hashlib.sha256(lines[kept].tobytes()).hexdigest()


def write_marker(
    shard: Shard, ids: Sequence[str], files: Mapping[str, ShardFile], digests: np.ndarray | None = None
) -> None:
    """Write the marker of a shard, last of all its files: from now on the shard exists.

    ids: of its rows. files: by the names of the features. digests: uint8 [rows, 16] of the images, None if they are
    not known.
    """
    content = {
        "store": shard.manifest.id,
        "split": shard.split,
        "shard": shard.number,
        "rows": list(shard.rows),
        "ids_sha256": ids_sha256(ids_array(ids)),
        **({} if digests is None else {"images": digests.tobytes().hex()}),
        "files": files,
    }
    with shard.folder.writing(shard.marker_name) as file:
        file.write(seal(content))


def committed(folder: Folder, manifest: Manifest, split: str) -> set[int]:
    """Return the numbers of the shards of a split that have a marker, whatever it says."""
    names = folder.names(f"{COMMITS}/{split}")
    return {number for number in range(manifest.shards(split)) if f"{number:06d}{manifest.mark}.json" in names}


def find_marker(shard: Shard) -> Marker | None:
    """Return a shard's marker, or None if the shard is not committed. Raises BadInput if the marker is damaged."""
    folder, name, id = shard.folder, shard.marker_name, shard.manifest.id
    try:
        content = unseal(folder.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BadInput(f"damaged marker {folder}/{name}: {error}; {remedy(folder)}") from None
    if isinstance(content.get("store"), str) and content["store"] != id:
        raise BadInput(
            f"marker {folder}/{name} belongs to another store (id {content['store'][:8]}, this is {id[:8]}); "
            f"{remedy(folder)}"
        )
    if not _is_marker(content, shard):
        raise BadInput(f"marker {folder}/{name} is not that of its shard; {remedy(folder)}")
    return cast(Marker, content)


def read_marker(shard: Shard) -> Marker:
    """Return a shard's marker. Raises BadInput if it is damaged, or gone."""
    marker = find_marker(shard)
    if marker is None:
        name = f"{shard.folder}/{shard.marker_name}"
        raise BadInput(f"{name} is gone: the shard is not committed; {remedy(shard.folder)}")
    return marker


def _is_marker(content: dict[str, Any], shard: Shard) -> bool:
    """Return whether a JSON object has every field of the shard's marker, with values of the right types."""
    place = {"store": shard.manifest.id, "split": shard.split, "shard": shard.number, "rows": list(shard.rows)}
    files, features = content.get("files"), shard.manifest.features
    # They are compared as JSON, in which true is not 1.
    if json.dumps({field: content.get(field) for field in place}) != json.dumps(place):
        return False
    if not isinstance(files, dict) or files.keys() != features.keys():
        return False
    if not _is_hex(content.get("ids_sha256"), 32):
        return False
    if "images" in content and not _is_hex(content["images"], DIGEST_BYTES * len(shard)):
        return False
    return all(_is_shard_file(file, -(-len(shard) // features[name]["chunk_rows"])) for name, file in files.items())


def _is_shard_file(file: object, chunks: int) -> bool:
    """Return whether a JSON value is a ShardFile of so many chunks."""
    if not isinstance(file, dict) or file.keys() != {"bytes", "crc32", "offset", "rows_crc32c"}:
        return False
    crcs = file["rows_crc32c"]
    if not isinstance(crcs, list) or len(crcs) != chunks:
        return False
    numbers = (file["bytes"], file["crc32"], file["offset"], *crcs)
    return all(type(number) is int and number >= 0 for number in numbers) and file["offset"] <= file["bytes"]


def _is_hex(text: object, length: int) -> bool:
    return isinstance(text, str) and len(text) == 2 * length and re.fullmatch("[0-9a-f]*", text) is not None


def digests_of(marker: Marker) -> np.ndarray | None:
    """Return the digests of a shard's images, uint8 [rows, 16]; None if the marker is from before there were any."""
    if "images" not in marker:
        return None
    first, end = marker["rows"]
    return np.frombuffer(bytes.fromhex(marker["images"]), np.uint8).reshape(end - first, -1)
