"""`featcache verify`: every byte of a store against its checksums; `--repair` drops what is damaged."""

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from featcache.errors import BadInput
from featcache.names import ADDITION, COMMITS, MANIFEST
from featcache.progress import Progress
from featcache.store.additions import fits, merge, order_parts, read_file
from featcache.store.folder import Folder, open_folder
from featcache.store.formats import format_of
from featcache.store.manifest import FORMAT, Manifest, parse_manifest, read_manifest
from featcache.store.mapped_rows import chunk_of
from featcache.store.marker import LOCK, ShardFile, committed, find_marker, ids_sha256
from featcache.store.sealed import unseal
from featcache.store.shard import Shard
from featcache.store.zarr_format import bad_chunks, crc_of


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store: where it is, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(store: str | os.PathLike[str] | Folder, repair: bool = False) -> list[Finding]:
    """Check every marker, length and checksum of a store; return the list of Findings, empty if it is whole.

    store: path or URL. repair: drop what is damaged, so that the same `extract` makes only that again. Shards that are
    missing are findings too. Raises BadInput if there is no store at all.

        for finding in featcache.verify("voc.zarr"):
            print(finding.where, finding.what)
    """
    folder = open_folder(store)
    first = _check_manifest(folder)
    if isinstance(first, Finding):
        if repair:
            folder.delete(MANIFEST)
        return [first]
    additions, findings = _check_additions(folder, repair)
    try:
        parts = order_parts(folder, first, additions)
    except BadInput as error:
        findings.append(Finding(MANIFEST, error.message))
        parts = [first]
    manifest = merge(parts)
    findings += _check_files(folder, manifest, additions, repair)
    ids_are_whole = not findings
    if "lock" in folder.names(COMMITS) and folder.size(LOCK) is None:
        if repair:
            folder.delete(LOCK)
        findings.append(Finding(LOCK, "it is no file"))
    total = sum(entry["bytes"] for entry in manifest.files.values()) or 1
    with Progress("verify", total, unit="B", fleeting=True) as progress:
        for split in manifest.splits:
            ids = _read_ids(folder, manifest, split) if ids_are_whole else None
            for part in (part for part in parts if split in part.splits):
                for number in range(part.shards(split)):
                    findings += _check_shard(Shard(folder, part, split, number), ids, repair, progress)
        for addition in (addition for addition in additions if addition.after is None):
            for split in addition.splits:
                for number in sorted(committed(folder, addition, split)):
                    findings += _check_shard(Shard(folder, addition, split, number), None, repair, progress)
    return findings


def _check_additions(folder: Folder, repair: bool) -> tuple[list[Manifest], list[Finding]]:
    """Return the additions of a store, whole or not, and what is wrong with the manifests of others."""
    additions, findings = [], []
    for name in sorted(filter(ADDITION.fullmatch, folder.names())):
        try:
            additions.append(parse_manifest(folder.read(name), folder, name))
        except (FileNotFoundError, BadInput) as error:
            if repair:
                folder.delete(name)
            findings.append(Finding(name, error.message if isinstance(error, BadInput) else "it is no file"))
    known = {addition.mark for addition in additions} | {f"-{finding.where[9:17]}" for finding in findings}
    marks = {name[6:-5] for split in folder.names(COMMITS) for name in folder.names(f"{COMMITS}/{split}")}
    for mark in sorted(mark for mark in marks - known if ADDITION.fullmatch(f"addition{mark}.json")):
        findings.append(Finding(f"addition{mark}.json", "missing; the same extract again makes it anew"))
    return additions, findings


def _check_manifest(folder: Folder) -> Manifest | Finding:
    """Return the manifest of a store, or what is wrong with it. Raises BadInput if it is not one that can be mended."""
    try:
        manifest = parse_manifest(folder.read(MANIFEST), folder)
    except FileNotFoundError:
        if not folder.names() & {COMMITS, MANIFEST}:
            read_manifest(folder)
        return Finding(MANIFEST, "missing; the same extract again makes it anew, and checks all that is there")
    except BadInput as error:
        if _is_sealed(folder):
            raise
        return Finding(MANIFEST, f"{error.message}; without it nothing else can be checked")
    other = _other_store(folder, manifest)
    if other:
        return Finding(MANIFEST, f"it is the manifest of store {manifest.id[:8]}, all markers are of store {other[:8]}")
    return manifest


def _is_sealed(folder: Folder) -> bool:
    """Return whether the manifest's bytes are as they were written: then it is of another version, and not damaged."""
    try:
        return unseal(folder.read(MANIFEST)).get("format") == FORMAT
    except ValueError:
        return False


def _other_store(folder: Folder, manifest: Manifest) -> str | None:
    """Return the id of another store if all markers are of that one; None otherwise. Those of additions do not count."""
    ids = set()
    for split in sorted(folder.names(COMMITS) - {"lock"}):
        for name in sorted(filter(re.compile("[0-9]{6}.json").fullmatch, folder.names(f"{COMMITS}/{split}"))):
            try:
                ids.add(unseal(folder.read(f"{COMMITS}/{split}/{name}")).get("store"))
            except (FileNotFoundError, ValueError, BadInput):
                continue
            if manifest.id in ids or len(ids) > 1:
                return None
    other = ids.pop() if ids else None
    return other if isinstance(other, str) else None


def _read_ids(folder: Folder, manifest: Manifest, split: str) -> np.ndarray | None:
    """Return the ids of a split, uint8 [N, L]; None where the files that should hold them are whole but do not."""
    try:
        ids = format_of(manifest).read_array(partial(read_file, folder, manifest), split, "ids")
    except (BadInput, ValueError, KeyError, TypeError):
        return None
    return ids if ids.ndim == 2 and ids.dtype == np.uint8 else None


def _check_files(folder: Folder, manifest: Manifest, additions: Sequence[Manifest], repair: bool) -> Iterator[Finding]:
    """Check the files beside the shards. A file may be that of an addition which is about to become whole."""
    beginning = [addition for addition in additions if addition.after is None]
    for name in manifest.files:
        try:
            data = folder.read(name)
        except (FileNotFoundError, BadInput) as error:
            if repair:
                # A folder may lie in its place.
                folder.delete(name)
            yield Finding(name, error.message if isinstance(error, BadInput) else "missing")
            continue
        if not any(fits(data, named, name) for named in (manifest, *beginning)):
            if repair:
                folder.delete(name)
            yield Finding(name, "its bytes do not fit the manifest's checksum")


def _check_shard(shard: Shard, ids: np.ndarray | None, repair: bool, progress: Progress) -> list[Finding]:
    """Check a shard. ids: those of its split, uint8 [N, L], None if they are not known."""
    try:
        marker = find_marker(shard)
    except BadInput as error:
        if repair:
            drop_shard(shard, ())
        return [Finding(shard.marker_name, f"{shard}: {error.message.split(';')[0]}")]
    if marker is None:
        if repair:
            drop_shard(shard, ())
        return [Finding(shard.marker_name, f"{shard} is missing")]
    findings, bad = [], []
    first, end = shard.rows
    if ids is not None and ids_sha256(ids[first:end]) != marker["ids_sha256"]:
        findings.append(Finding(shard.marker_name, f"{shard}: it was made for other ids"))
    for feature, file in marker["files"].items():
        progress.total = max(progress.total, progress.done + file["bytes"])
        reason = _wrong_with_file(shard, feature, file)
        progress.update(file["bytes"])
        if reason:
            bad.append(feature)
            findings.append(Finding(shard.file_name(feature), f"{shard}, feature {feature}: {reason}"))
    if findings and repair:
        drop_shard(shard, bad)
    return findings


def _wrong_with_file(shard: Shard, feature: str, file: ShardFile) -> str | None:
    """Return what is wrong with a shard's file of a feature, None if nothing is. file: what the marker says of it."""
    try:
        data = shard.folder.read(shard.file_name(feature))
    except FileNotFoundError:
        return "the file is missing"
    except BadInput as error:
        return error.message
    if len(data) != file["bytes"]:
        return f"{len(data)} bytes, its marker says {file['bytes']}"
    if zlib.crc32(data) == file["crc32"]:
        return None
    try:
        chunks = _damaged_chunks(shard, feature, file, data)
    except ValueError as error:
        return str(error)
    (first, end), step = shard.rows, shard.manifest.features[feature]["chunk_rows"]
    rows = ", ".join(f"{first + c * step} to {min(first + (c + 1) * step, end) - 1}" for c in chunks)
    return f"damaged rows {rows}" if rows else "its bytes do not fit its marker's checksum"


def _damaged_chunks(shard: Shard, feature: str, file: ShardFile, data: bytes) -> list[int]:
    """Return the numbers of the chunks that do not fit their checksums. Raises ValueError if none can be looked at."""
    manifest, rows = shard.manifest, len(shard)
    spec, shard_rows = manifest.features[feature], manifest.splits[shard.split]["shard_rows"]
    if manifest.storage["compression"]:
        return bad_chunks(data, spec, shard_rows)
    view = format_of(manifest).view_shard(data, file["offset"], spec, shard_rows, rows)
    crcs = enumerate(file["rows_crc32c"])
    return [number for number, crc in crcs if crc_of(chunk_of(view, number, spec["chunk_rows"], rows)) != crc]


def drop_shard(shard: Shard, features: Sequence[str]) -> None:
    """Take a shard out of its store: first its marker, then its files of some features."""
    shard.folder.delete(shard.marker_name)
    for feature in features:
        shard.folder.delete(shard.file_name(feature))
