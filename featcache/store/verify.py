"""`featcache verify`: every byte of a store against its checksums; `--repair` drops what is bad."""

import zlib
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.formats import FORMATS, shard_file
from featcache.store.manifest import FILE, FORMAT, parse_manifest, read_file, read_manifest
from featcache.store.manifest_fields import COMMITS
from featcache.store.marker import LOCK, ids_sha256, marker_name, read_marker
from featcache.store.records import ids_of
from featcache.store.sealed import unseal
from featcache.store.sources import chunk_of
from featcache.store.zarr_format import bad_chunks, crc_of


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store: where it is, and what."""

    where: str
    what: str

    def __str__(self):
        return f"{self.where}: {self.what}"


def verify(store, repair=False):
    """Check every marker, length and checksum of a store; return the list of Findings, empty if it is whole.

    store: path or URL. repair: drop what is damaged, so that the same `extract` again makes just that
    anew. Shards that are missing are findings too. Raises BadInput if there is no store at all.
    """
    folder = open_folder(store)
    try:
        manifest = parse_manifest(folder.read(FILE), folder)
    except FileNotFoundError:
        if not folder.names() & {COMMITS, FILE}:
            read_manifest(folder)
        if repair:
            folder.delete(FILE)
        return [Finding(FILE, "missing; the same extract again makes it anew, and checks all that is there")]
    except BadInput as error:
        if _sealed(folder):
            raise
        if repair:
            folder.delete(FILE)
        return [Finding(FILE, f"{error.message}; without it nothing else can be checked")]
    other = _other_store(folder, manifest)
    if other:
        if repair:
            folder.delete(FILE)
        return [Finding(FILE, f"it is the manifest of store {manifest.id[:8]}, all markers are of store {other[:8]}")]
    findings = [*_check_files(folder, manifest, repair)]
    lost = {finding.where for finding in findings}
    if "lock" in folder.names(COMMITS) and folder.size(LOCK) is None:
        if repair:
            folder.delete(LOCK)
        findings.append(Finding(LOCK, "it is no file"))
    total = sum(entry["bytes"] for entry in manifest.files.values()) or 1
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", leave=False) as progress:
        for split in manifest.splits:
            ids = None if lost else _read_ids(folder, manifest, split)
            for shard in range(manifest.shards(split)):
                findings += _check_shard(folder, manifest, split, shard, ids, repair, progress)
    return findings


def _sealed(folder):
    """Whether the manifest's bytes are those that were written, and so of another version rather than damaged."""
    try:
        return unseal(folder.read(FILE)).get("format") == FORMAT
    except ValueError:
        return False


def _other_store(folder, manifest):
    """The id of another store if all markers are of that one; None otherwise."""
    ids = set()
    for split in sorted(folder.names(COMMITS) - {"lock"}):
        for name in sorted(folder.names(f"{COMMITS}/{split}")):
            try:
                ids.add(unseal(folder.read(f"{COMMITS}/{split}/{name}")).get("store"))
            except (FileNotFoundError, ValueError, BadInput):
                continue
            if manifest.id in ids or len(ids) > 1:
                return None
    other = ids.pop() if ids else None
    return other if isinstance(other, str) else None


def _read_ids(folder, manifest, split):
    """The ids of a split, None where the files that should hold them are whole, and hold none."""
    try:
        return ids_of(
            FORMATS[manifest.storage["format"]].read_array(partial(read_file, folder, manifest), split, "ids")
        )
    except (BadInput, ValueError, KeyError, TypeError):
        return None


def _check_files(folder, manifest, repair):
    """The files beside the shards."""
    for name, entry in manifest.files.items():
        try:
            data = folder.read(name)
        except (FileNotFoundError, BadInput) as error:
            if repair:
                # A folder may lie in its place.
                folder.delete(name)
            yield Finding(name, error.message if isinstance(error, BadInput) else "missing")
            continue
        if len(data) != entry["bytes"] or zlib.crc32(data) != entry["crc32"]:
            if repair:
                folder.delete(name)
            yield Finding(name, "its bytes do not fit the manifest's checksum")


def _check_shard(folder, manifest, split, shard, ids, repair, progress):
    first, end = manifest.rows_of(split, shard)
    here = f"split {split}, shard {shard} (rows {first} to {end - 1})"
    try:
        marker = read_marker(folder, manifest, split, shard)
    except BadInput as error:
        if repair:
            drop_shard(folder, manifest, split, shard, ())
        return [Finding(marker_name(split, shard), f"{here}: {error.message.split(';')[0]}")]
    if marker is None:
        if repair:
            drop_shard(folder, manifest, split, shard, ())
        return [Finding(marker_name(split, shard), f"{here} is missing")]
    findings, bad = [], []
    if ids is not None and ids_sha256(ids[first:end]) != marker["ids_sha256"]:
        findings.append(Finding(marker_name(split, shard), f"{here}: it was made for other ids"))
    for feature, entry in marker["files"].items():
        name = shard_file(manifest, split, shard, feature)
        progress.total = max(progress.total, progress.n + entry["bytes"])
        what = _wrong_with(folder, manifest, split, shard, feature, name, entry)
        progress.update(entry["bytes"])
        if what:
            bad.append(feature)
            findings.append(Finding(name, f"{here}, feature {feature}: {what}"))
    if findings and repair:
        drop_shard(folder, manifest, split, shard, bad)
    return findings


def _wrong_with(folder, manifest, split, shard, feature, name, entry):
    """What is wrong with a shard's file, None if nothing is."""
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return "the file is missing"
    except BadInput as error:
        return error.message
    if len(data) != entry["bytes"]:
        return f"{len(data)} bytes, its marker says {entry['bytes']}"
    if zlib.crc32(data) == entry["crc32"]:
        return None
    spec, shard_rows = manifest.features[feature], manifest.splits[split]["shard_rows"]
    first, end = manifest.rows_of(split, shard)
    step = spec["chunk_rows"]
    try:
        if manifest.storage["compression"]:
            chunks = bad_chunks(data, spec, shard_rows)
        else:
            view = FORMATS[manifest.storage["format"]].view_shard(data, entry, spec, shard_rows, end - first)
            chunks = [
                n for n, crc in enumerate(entry["rows_crc32c"]) if crc_of(chunk_of(view, n, step, end - first)) != crc
            ]
    except ValueError as error:
        return str(error)
    rows = ", ".join(f"{first + c * step} to {min(first + (c + 1) * step, end) - 1}" for c in chunks)
    return f"damaged rows {rows}" if rows else "its bytes do not fit its marker's checksum"


def drop_shard(folder, manifest, split, shard, names):
    """Take a shard out of a store: first its marker, then the files of the features `names`."""
    folder.delete(marker_name(split, shard))
    for name in names:
        folder.delete(shard_file(manifest, split, shard, name))
