"""Making a store and filling its shards, safe against a kill at any moment."""

import io
import mmap
import zlib
from dataclasses import replace

from featcache.atomic import PARTIAL
from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.formats import FORMATS, shard_file
from featcache.store.manifest import FILE, difference, identity_hash, read_file, read_manifest, remedy
from featcache.store.manifest_fields import COMMITS
from featcache.store.marker import LOCK, committed, marker_name, read_marker, write_marker
from featcache.store.verify import verify
from featcache.store.zarr_format import crc_of


def create_store(place, manifest, arrays):
    """Make a store with all but its shards, or mend what a begun one lacks; return its Manifest.

    Call it with the folder locked: it sweeps up what killed writers left. The manifest comes first,
    and names every other file with its checksum. arrays: {split: {name: (array, axes)}}, see
    featcache.store.records. Raises BadInput if something else is in the way.
    """
    folder = open_folder(place)
    # A writer that was killed at its very first file leaves no more than a part of the manifest.
    entries = {name for name in folder.names() if not (name.startswith(FILE) and name.endswith(PARTIAL))}
    files = None
    if FILE in entries:
        there = check_same(folder, manifest.identity, manifest.storage)
        rows = [{split: geometry["rows"] for split, geometry in m.splits.items()} for m in (there, manifest)]
        if rows[0] != rows[1] or there.features.keys() != manifest.features.keys():
            raise BadInput(f"{folder}: its manifest has other splits or features than its id stands for; delete it")
        manifest = there
        folder.sweep()
    elif entries and COMMITS not in entries:
        raise BadInput(f"{folder} is there already and is not a featcache store: choose another place with --store")
    else:
        # Only now is it sure that the folder is ours to sweep.
        folder.sweep()
        files = FORMATS[manifest.storage["format"]].metadata_files(manifest, arrays)
        manifest = replace(manifest, files={n: {"bytes": len(d), "crc32": zlib.crc32(d)} for n, d in files.items()})
        with folder.writing(FILE) as file:
            file.write(manifest.to_bytes())
    lacking = list(files) if files else missing_files(folder, manifest)
    if lacking and files is None:
        files = FORMATS[manifest.storage["format"]].metadata_files(manifest, arrays)
    for name in lacking:
        if name not in files or zlib.crc32(files[name]) != manifest.files[name]["crc32"]:
            raise BadInput(
                f"{folder}/{name} is lost, and this version of {manifest.storage['format']} writes it otherwise: "
                "extract into another store"
            )
        with folder.writing(name) as file:
            file.write(files[name])
    if COMMITS in entries and FILE not in entries:
        # Without a manifest nobody could look at the shards.
        verify(folder, repair=True)
    return manifest


def check_same(folder, identity, storage):
    """Return the manifest of the store that is there.

    Raises BadInput, naming the fields that differ, if it has another identity or is stored otherwise.
    """
    there, id = read_manifest(folder), identity_hash(identity)
    if there.id != id:
        fields = "; ".join(difference(there.identity, identity))
        raise BadInput(f"{folder} is another store (id {there.id[:8]}, asked for {id[:8]}): {fields}")
    if there.storage != storage:
        fields = "; ".join(difference(there.storage, storage))
        raise BadInput(f"{folder} is stored otherwise ({fields}): choose another --store, or use featcache convert")
    return there


def missing_files(folder, manifest):
    """Return the names of the files beside the shards that are lost or damaged."""

    def lacks(name):
        try:
            read_file(folder, manifest, name)
        except BadInput:
            return True
        return False

    lost = folder.each(lacks, manifest.files)
    return [name for name, gone in zip(manifest.files, lost, strict=True) if gone]


def check_whole(folder, manifest):
    """Look at what is there at the end of a work: the manifest, every file, every marker and its shard's files.

    Lengths only of the files of shards, whose bytes are compared when they are read. Raises BadInput for the first
    thing that is gone or another than it was.
    """
    if read_manifest(folder).to_bytes() != manifest.to_bytes():
        raise BadInput(f"{folder}/{FILE} was replaced by another one; {remedy(folder)}")
    for name in missing_files(folder, manifest):
        raise BadInput(f"{folder}/{name} is gone or damaged; {remedy(folder)}")
    check_shards(folder, manifest)


def check_shards(folder, manifest):
    """Look whether every shard has its marker and its files, of the right lengths. Raises BadInput for the first."""

    def look(place):
        marker = read_marker(folder, manifest, *place)
        if marker is None:
            return f"{marker_name(*place)} is gone"
        for feature, entry in marker["files"].items():
            name = shard_file(manifest, *place, feature)
            size = folder.size(name)
            if size != entry["bytes"]:
                return f"{name} is gone" if size is None else f"{name} has {size} bytes, not {entry['bytes']}"
        return None

    for found in folder.each(look, manifest.all_shards()):
        if found:
            raise BadInput(f"{folder}/{found}; {remedy(folder)}")


def missing_shards(folder, manifest):
    """Return [(split, shard)] that are not committed, in order."""
    there = {split: committed(folder, manifest, split) for split in manifest.splits}
    return [(split, shard) for split, shard in manifest.all_shards() if shard not in there[split]]


def put_shard(folder, manifest, split, shard, ids, features, digests=None):
    """Write a whole shard, all its features, and commit it.

    ids: of its rows. features: {name: array [rows, ...] as it is stored}. digests: uint8 [rows, 16]
    of the images, None if they are not known. A shard that is committed already with the same rows is
    left alone. Raises BadInput if it is there with others.
    """
    first, end = manifest.rows_of(split, shard)
    layout = FORMATS[manifest.storage["format"]]
    for name, rows in features.items():
        if len(rows) != end - first:
            raise ValueError(f"shard {shard} of {split} has {end - first} rows, {name} brings {len(rows)}")
    crcs = {name: _rows_crc32c(rows, manifest.features[name]["chunk_rows"]) for name, rows in features.items()}
    # Two processes may come with the same shard; what one has committed the other must not touch.
    with folder.one_writer(LOCK, manifest.all_shards().index((split, shard))):
        there = read_marker(folder, manifest, split, shard)
        if there is not None:
            if {name: there["files"][name]["rows_crc32c"] for name in crcs} == crcs:
                return
            raise BadInput(
                f"{folder}/{marker_name(split, shard)}: the shard is committed with other values; the backbone does "
                "not give the same features twice (another device, thread count or library?)"
            )
        files = {}
        for name, rows in features.items():
            with folder.writing(shard_file(manifest, split, shard, name)) as file:
                geometry, compression = manifest.splits[split]["shard_rows"], manifest.storage["compression"]
                offset = layout.write_shard(file, rows, manifest.features[name], geometry, compression)
                length, crc = _measure(file)
            files[name] = {"bytes": length, "crc32": crc, "offset": offset, "rows_crc32c": crcs[name]}
        write_marker(folder, manifest, split, shard, ids, files, digests)


def _rows_crc32c(rows, chunk_rows):
    return [crc_of(rows[start : start + chunk_rows]) for start in range(0, len(rows), chunk_rows)]


def _measure(file):
    """Length and crc32 of a file that is open for writing and reading.

    Not crc32c: bytes that are followed by their own crc32c, as Zarr's chunks are, always have the same one.
    """
    if isinstance(file, io.BytesIO):
        return file.getbuffer().nbytes, zlib.crc32(file.getbuffer())
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return len(data), zlib.crc32(data)


def discard_if_empty(folder, manifest):
    """Remove this store if no shard was ever committed: nothing is lost, and nothing looks whole."""
    try:
        check_same(folder, manifest.identity, manifest.storage)
    except BadInput:
        # Whatever lies there is not ours to delete.
        return
    if not any(committed(folder, manifest, split) for split in manifest.splits):
        folder.delete_all()
