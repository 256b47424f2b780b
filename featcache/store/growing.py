"""Adding to a store, safe against a kill at any moment, and out of sight until the addition is whole.

The manifest of an addition comes first, then its shards with their markers, then the files that list its features and
splits. Last its manifest is written again, with the id of the store before it: from then on it is a part of the store.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from featcache.errors import BadInput
from featcache.store.additions import find_additions, fits, merge, order_parts
from featcache.store.folder import Folder
from featcache.store.formats import format_of
from featcache.store.manifest import FileEntry, Manifest, read_manifest
from featcache.store.marker import committed
from featcache.store.records import AxedArrays
from featcache.store.shard import Shard
from featcache.store.verify import drop_shard, verify
from featcache.store.writer import missing_files, write_files


def whole_parts(folder: Folder) -> list[Manifest]:
    """Return the parts of a store that is about to be added to, as far as none before them is lost."""
    return order_parts(folder, read_manifest(folder), find_additions(folder), lost=True)


def begin_addition(folder: Folder, planned: Manifest) -> Manifest:
    """Begin an addition, or go on with one; return its Manifest.

    Call it with the folder locked. Additions that were begun and not finished give way if they hold some of the same
    features of the same splits. Raises BadInput if the addition was begun with other shapes.
    """
    for other in find_additions(folder):
        if other.id == planned.id:
            if _shapes(other) != _shapes(planned):
                raise BadInput(
                    f"{folder}/{other.file_name} has other features or rows than its id stands for; delete it"
                )
            return other
        if other.after is None and other.features.keys() & planned.features and other.splits.keys() & planned.splits:
            drop_addition(folder, other)
    begun = any(committed(folder, planned, split) for split in planned.splits)
    _write_manifest(folder, planned)
    if begun:
        # Without a manifest nobody could check the shards.
        verify(folder, repair=True)
    return planned


def publish(folder: Folder, addition: Manifest, arrays: Mapping[str, AxedArrays]) -> None:
    """Make an addition whose shards are all there a part of the store.

    arrays: the small arrays of all splits and views of the store with the addition.
    """
    parts = whole_parts(folder)
    before, after = merge(parts), merge([*parts, addition])
    files = format_of(after).metadata_files(after, arrays, [*parts, addition])
    entries: dict[str, FileEntry] = {
        name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()
    }
    own = {name: entry for name, entry in entries.items() if before.files.get(name) != entry}
    addition = replace(addition, files=own)
    # Whoever finds one of these files new must find it named.
    _write_manifest(folder, addition)
    write_files(folder, addition, files, [name for name in own if not _is_written(folder, addition, name)])
    _write_manifest(folder, replace(addition, after=before.id))


def restore(folder: Folder, parts: Sequence[Manifest], arrays: Mapping[str, AxedArrays]) -> None:
    """Write anew what a store has lost beside its shards. arrays: as in `publish`. Raises BadInput if that cannot be."""
    manifest = merge(parts)
    lacking = missing_files(folder, manifest)
    if lacking:
        write_files(folder, manifest, format_of(manifest).metadata_files(manifest, arrays, parts), lacking)


def drop_addition(folder: Folder, addition: Manifest) -> None:
    """Take an addition that is not whole out of a store: first its markers, then its manifest."""
    for split in addition.splits:
        for number in committed(folder, addition, split):
            drop_shard(Shard(folder, addition, split, number), ())
    folder.delete(addition.file_name)


def discard_if_begun(folder: Folder, additions: Sequence[Manifest]) -> None:
    """Take out those additions of which no shard was ever committed."""
    for addition in find_additions(folder) if additions else ():
        mine = addition.after is None and addition.id in {planned.id for planned in additions}
        if mine and not any(committed(folder, addition, split) for split in addition.splits):
            drop_addition(folder, addition)


def _shapes(manifest: Manifest) -> list[Mapping[str, object]]:
    """Return the shapes of a manifest's features and the rows of its splits."""
    shapes = {name: spec["shape"] for name, spec in manifest.features.items()}
    return [shapes, {name: geometry["rows"] for name, geometry in manifest.splits.items()}]


def _is_written(folder: Folder, addition: Manifest, name: str) -> bool:
    try:
        return fits(folder.read(name), addition, name)
    except (FileNotFoundError, BadInput):
        return False


def _write_manifest(folder: Folder, addition: Manifest) -> None:
    with folder.writing(addition.file_name) as file:
        file.write(addition.to_bytes())
