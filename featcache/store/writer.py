"""Making a store and filling its shards, safe against a kill at any moment."""

import io
import mmap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from featcache.atomic import PARTIAL
from featcache.errors import BadInput
from featcache.names import COMMITS, MANIFEST
from featcache.store.additions import fits, merge, read_file, read_parts
from featcache.store.folder import Folder, open_folder
from featcache.store.formats import format_of
from featcache.store.manifest import (
    Manifest,
    Storage,
    difference,
    identity_hash,
    read_manifest,
    remedy,
)
from featcache.store.marker import LOCK, ShardFile, committed, find_marker, write_marker
from featcache.store.records import AxedArrays
from featcache.store.shard import Shard, all_shards
from featcache.store.verify import verify
from featcache.store.zarr_format import crc_of


def create_store(place: object, manifest: Manifest, arrays: Mapping[str, AxedArrays]) -> Manifest:
    """Make a store with everything but its shards, or restore what a begun one lacks; return its Manifest.

    place: path, URL or Folder. Call it with the folder locked: it deletes what killed writers left behind. The manifest
    comes first, and names every other file with its checksum. arrays: the small arrays of each split and view, see
    featcache.store.records. Raises BadInput if something else is in the way.
    """
    folder = open_folder(place)
    entries = check_is_free(folder)
    if MANIFEST in entries:
        manifest = _begun(folder, manifest)
        folder.sweep()
        lacking = missing_files(folder, manifest)
        files = format_of(manifest).metadata_files(manifest, arrays) if lacking else {}
    else:
        # Only now it is certain that the folder is ours to sweep.
        folder.sweep()
        files = format_of(manifest).metadata_files(manifest, arrays)
        lacking = list(files)
        manifest = replace(manifest, files={n: {"bytes": len(d), "crc32": zlib.crc32(d)} for n, d in files.items()})
        with folder.writing(MANIFEST) as file:
            file.write(manifest.to_bytes())
    write_files(folder, manifest, files, lacking)
    if COMMITS in entries and MANIFEST not in entries:
        # Without a manifest nobody could check the shards.
        verify(folder, repair=True)
    return manifest


def check_is_free(folder: Folder) -> set[str]:
    """Return the names of what lies in the place of a store. Raises BadInput if that is something else than a store."""
    # A writer that was killed at its very first file leaves only a part of the manifest.
    entries = {name for name in folder.names() if not (name.startswith(MANIFEST) and name.endswith(PARTIAL))}
    if entries and not entries & {MANIFEST, COMMITS}:
        raise BadInput(f"{folder} is there already and is not a featcache store: choose another place with --store")
    return entries


def write_files(folder: Folder, manifest: Manifest, files: Mapping[str, bytes], names: Iterable[str]) -> None:
    """Write some of a manifest's files. files: {name: bytes}. Raises BadInput if they are not those that it names."""
    for name in names:
        if name not in files or not fits(files[name], manifest, name):
            raise BadInput(
                f"{folder}/{name} is lost, and this version of {manifest.storage['format']} writes it otherwise: "
                "extract into another store"
            )
        with folder.writing(name) as file:
            file.write(files[name])


def _begun(folder: Folder, planned: Manifest) -> Manifest:
    """Return the manifest of a begun store. Raises BadInput if it is not of the planned one."""
    begun = check_same(folder, planned.identity, planned.storage)
    rows = [{split: geometry["rows"] for split, geometry in m.splits.items()} for m in (begun, planned)]
    if rows[0] != rows[1] or begun.features.keys() != planned.features.keys():
        raise BadInput(f"{folder}: its manifest has other splits or features than its id stands for; delete it")
    return begun


def check_same(folder: Folder, identity: Mapping[str, Any], storage: Storage) -> Manifest:
    """Return the manifest of the store in a folder, which has this identity and storage.

    Raises BadInput, naming the fields that differ, if it has another identity or is stored otherwise.
    """
    begun, id = read_manifest(folder), identity_hash(identity)
    if begun.id != id:
        fields = "; ".join(difference(begun.identity, identity))
        raise BadInput(f"{folder} is another store (id {begun.id[:8]}, asked for {id[:8]}): {fields}")
    if begun.storage != storage:
        fields = "; ".join(difference(begun.storage, storage))
        raise BadInput(f"{folder} is stored otherwise ({fields}): choose another --store, or use featcache convert")
    return begun


def missing_files(folder: Folder, manifest: Manifest) -> list[str]:
    """Return the names of the files beside the shards that are lost or damaged."""

    def lacks(name: str) -> bool:
        try:
            read_file(folder, manifest, name)
        except BadInput:
            return True
        return False

    lost = folder.each(lacks, manifest.files)
    return [name for name, gone in zip(manifest.files, lost, strict=True) if gone]


def check_whole(folder: Folder, manifest: Manifest) -> None:
    """Check at the end of the work that everything is there: the manifest, every file, every marker, every shard's files.

    Of the files of shards only the length is compared: their bytes are when they are read. Raises BadInput for the
    first thing that is gone or has changed.
    """
    parts = read_parts(folder)
    if merge(parts).to_bytes() != manifest.to_bytes():
        raise BadInput(f"{folder}/{MANIFEST} was replaced by another one; {remedy(folder)}")
    for name in missing_files(folder, manifest):
        raise BadInput(f"{folder}/{name} is gone or damaged; {remedy(folder)}")
    for part in parts:
        check_shards(folder, part)


def check_shards(folder: Folder, manifest: Manifest) -> None:
    """Check that every shard of a part of a store has its marker and its files, of the right lengths. Raises BadInput for the first."""

    def wrong_with(shard: Shard) -> str | None:
        marker = find_marker(shard)
        if marker is None:
            return f"{shard.marker_name} is gone"
        for feature, file in marker["files"].items():
            name = shard.file_name(feature)
            size = folder.size(name)
            if size != file["bytes"]:
                return f"{name} is gone" if size is None else f"{name} has {size} bytes, not {file['bytes']}"
        return None

    for reason in folder.each(wrong_with, all_shards(folder, manifest)):
        if reason:
            raise BadInput(f"{folder}/{reason}; {remedy(folder)}")


def missing_shards(folder: Folder, manifest: Manifest) -> list[Shard]:
    """Return the shards that are not committed, in order."""
    done = {split: committed(folder, manifest, split) for split in manifest.splits}
    return [shard for shard in all_shards(folder, manifest) if shard.number not in done[shard.split]]


def put_shard(
    shard: Shard, ids: Sequence[str], features: Mapping[str, np.ndarray], digests: np.ndarray | None = None
) -> None:
    """Write a whole shard, with all its features, and commit it.

    ids: of its rows. features: {name: array [rows, ...] as it is stored}. digests: uint8 [rows, 16] of the images, None
    if they are not known. A shard that is already committed with the same rows is left alone. Raises BadInput if it is
    committed with other rows.
    """
    manifest, folder = shard.manifest, shard.folder
    for name, rows in features.items():
        if len(rows) != len(shard):
            raise ValueError(f"shard {shard.number} of {shard.split} has {len(shard)} rows, {name} brings {len(rows)}")
    crcs = {name: _rows_crc32c(rows, manifest.features[name]["chunk_rows"]) for name, rows in features.items()}
    # Two processes may come with the same shard; one must not touch what the other has committed.
    with folder.one_writer(LOCK, shard.index):
        marker = find_marker(shard)
        if marker is not None:
            if {name: marker["files"][name]["rows_crc32c"] for name in crcs} == crcs:
                return
            raise BadInput(
                f"{folder}/{shard.marker_name}: the shard is committed with other values; the backbone does "
                "not give the same features twice (another device, thread count or library?)"
            )
        files = {name: _write_file(shard, name, rows, crcs[name]) for name, rows in features.items()}
        write_marker(shard, ids, files, digests)


def _write_file(shard: Shard, feature: str, rows: np.ndarray, crcs: list[int]) -> ShardFile:
    """Write a shard's rows of a feature; return what its marker is to say about the file."""
    manifest = shard.manifest
    spec, shard_rows = manifest.features[feature], manifest.splits[shard.split]["shard_rows"]
    with shard.folder.writing(shard.file_name(feature)) as file:
        offset = format_of(manifest).write_shard(file, rows, spec, shard_rows, manifest.storage["compression"])
        length, crc = _measure(file)
    return {"bytes": length, "crc32": crc, "offset": offset, "rows_crc32c": crcs}


def _rows_crc32c(rows: np.ndarray, chunk_rows: int) -> list[int]:
    return [crc_of(rows[start : start + chunk_rows]) for start in range(0, len(rows), chunk_rows)]


def _measure(file: BinaryIO) -> tuple[int, int]:
    """Return the length and crc32 of a file that is open for writing and reading.

    crc32c would not do: bytes that are followed by their own crc32c, as Zarr's chunks are, always have the same one.
    """
    if isinstance(file, io.BytesIO):
        return file.getbuffer().nbytes, zlib.crc32(file.getbuffer())
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return len(data), zlib.crc32(data)


def discard_if_empty(folder: Folder, manifest: Manifest) -> None:
    """Remove this store if no shard was ever committed: nothing is lost, and nothing is left that looks whole."""
    try:
        check_same(folder, manifest.identity, manifest.storage)
    except BadInput:
        # Whatever lies there is not ours to delete.
        return
    if not any(committed(folder, manifest, split) for split in manifest.splits):
        folder.delete_all()
