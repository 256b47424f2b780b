"""What a store is a store of: its identity, shapes and geometry, in manifest.json."""

import hashlib
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, fields, replace

from featcache.errors import BadInput, nearest, shown
from featcache.feature import Feature, parse_feature
from featcache.store.dtype import STORED
from featcache.store.folder import open_folder
from featcache.store.manifest_fields import check_fields, check_names
from featcache.store.sealed import seal, unseal

FILE = "manifest.json"
FORMAT = "featcache-store"
VERSION = 1

SHARD_BYTES = 128 << 20
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 256


@dataclass(frozen=True, repr=False)
class Manifest:
    """The contents of manifest.json.

    identity: what the features depend on; its hash is the store's id. splits: name to {rows,
    shard_rows}. features: name to {shape (of one row), dtype, chunk_rows}. aliases: layer names for
    people to module paths. classes, task: of the dataset. compute: {device, threads, batch_size} of
    the extraction, fixed for the store because they can change the last bits of a feature. storage:
    {format, compression}. files: name to {bytes, crc32} of all files but the shards and markers.
    """

    identity: dict
    splits: dict
    features: dict
    aliases: dict
    classes: list
    task: str
    compute: dict
    storage: dict
    files: dict

    def __repr__(self):
        return f"Manifest(id {self.id[:8]}, {', '.join(self.features)})"

    @property
    def id(self):
        """sha256 (hex) of the identity, independent of the order of its keys."""
        return identity_hash(self.identity)

    def shards(self, split):
        """Number of shards of a split."""
        return -(-self.splits[split]["rows"] // self.splits[split]["shard_rows"])

    def all_shards(self):
        """Every (split, shard), in order."""
        return [(split, shard) for split in self.splits for shard in range(self.shards(split))]

    def rows_of(self, split, shard):
        """First row and end row of a shard."""
        size = self.splits[split]["shard_rows"]
        return shard * size, min((shard + 1) * size, self.splits[split]["rows"])

    def row_bytes(self, feature):
        """Bytes of one row of a feature, uncompressed."""
        spec = self.features[str(feature)]
        return math.prod(spec["shape"]) * STORED[spec["dtype"]].itemsize

    def feature(self, name):
        """Resolve a feature's name or alias. Raises BadInput if the store does not hold it."""
        feature = parse_feature(name, self.aliases)
        if str(feature) not in self.features:
            hint = nearest(feature, self.features)
            raise BadInput(f"the store holds no feature {str(feature)!r}{hint} (it holds {', '.join(self.features)})")
        return feature

    def to_bytes(self):
        """Return the bytes of manifest.json."""
        return seal({"format": FORMAT, "version": VERSION, "id": self.id} | asdict(self))


def identity_hash(identity):
    """sha256 (hex) of an identity, a dict of JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def plan(identity, rows, shapes, dtype, aliases, classes, task, compute, storage):
    """Lay out a store: shard and chunk sizes follow from the bytes of a row.

    rows: {split: N}, views as view_group names them. shapes: {Feature: shape of one row}. dtype: of STORED. The others as in
    Manifest, whose `files` stay empty here. All features of a split have the same rows per shard;
    chunks are powers of two of rows, so that they divide it.
    """
    features, row_bytes = {}, 0
    for feature, shape in shapes.items():
        size = math.prod(shape) * STORED[dtype].itemsize
        chunk_rows = min(CHUNK_ROWS, _power_of_two_below(CHUNK_BYTES // size))
        features[str(feature)] = {"shape": list(shape), "dtype": dtype, "chunk_rows": chunk_rows}
        row_bytes += size
    unit = max(f["chunk_rows"] for f in features.values())
    full = max(SHARD_BYTES // row_bytes // unit, 1) * unit
    splits = {
        split: {"rows": count, "shard_rows": min(full, -(-count // unit) * unit)} for split, count in rows.items()
    }
    check_names(splits, features)
    return Manifest(identity, splits, features, dict(aliases), list(classes), task, compute, storage, {})


def _power_of_two_below(number):
    return 1 << (max(number, 1).bit_length() - 1)


def read_manifest(place):
    """Read the manifest of the store at a path, URL or folder. Raises BadInput if there is none or it is damaged."""
    folder = open_folder(place)
    try:
        data = folder.read(FILE)
    except (FileNotFoundError, NotADirectoryError):
        entries = folder.names()
        if FILE in entries:
            raise BadInput(f"damaged manifest {folder}/{FILE}: it is no file; {remedy(folder)}") from None
        if "commits" in entries:
            raise BadInput(
                f"store {folder} has lost its {FILE}: run the same extract again, which makes it anew"
            ) from None
        if not entries and (folder.remote or not os.path.exists(folder.path)):
            raise BadInput(f"store not found: {folder}") from None
        raise BadInput(f"not a featcache store (it has no {FILE}): {folder}") from None
    return parse_manifest(data, folder)


def parse_manifest(data, folder):
    """Turn the bytes of a manifest.json into a Manifest. Raises BadInput for damage and for other versions."""
    where = f"{folder}/{FILE}"
    try:
        content = unseal(data)
    except ValueError as error:
        raise BadInput(f"damaged manifest {where}: {error}; {remedy(folder)}") from None
    if content.get("format") != FORMAT:
        raise BadInput(f"damaged manifest {where}: it does not say format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise BadInput(
            f"store {folder} has format version {shown(content.get('version'))}; this featcache reads version {VERSION}"
        )
    if content.keys() != {"format", "version", "id"} | {field.name for field in fields(Manifest)}:
        raise BadInput(f"damaged manifest {where}: its fields are not those of version {VERSION}")
    try:
        check_fields(content)
    except BadInput as error:
        raise BadInput(f"manifest {where} is not one that featcache wrote: {error.message}") from None
    manifest = Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    if manifest.id != content["id"]:
        raise BadInput(f"damaged manifest {where}: its identity does not hash to its id")
    return manifest


def read_file(folder, manifest, name):
    """Return the bytes of a file that the manifest names. Raises BadInput if it is gone or damaged."""
    entry = manifest.files.get(name)
    if entry is None:
        raise BadInput(f"the manifest of store {folder} does not name {shown(name)}")
    try:
        data = folder.read(name)
    except FileNotFoundError:
        raise BadInput(f"missing file {folder}/{name}; {remedy(folder)}") from None
    if len(data) != entry["bytes"] or zlib.crc32(data) != entry["crc32"]:
        raise BadInput(f"damaged file {folder}/{name}; {remedy(folder)}")
    return data


def remedy(folder):
    """What to do about damage, for the end of an error's line."""
    return f"run featcache verify {folder} --repair, then the same extract again"


def difference(old, new, prefix=""):
    """Return lines that name the fields in which two identities differ, as `field: old -> new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


def view_group(split, view):
    """Name of the group that holds a view of a split; view 0 is the split itself."""
    return f"{split}@{view}" if view else split


def split_of(group):
    """The split that a group is a view of; a split is its own."""
    return group.partition("@")[0]


def feature_of(name):
    """Turn a manifest's feature name back into a Feature."""
    layer, _, reduction = name.rpartition(":")
    return Feature(layer, reduction)


def stored_as(manifest, format, compression):
    """The manifest of the same store in another format or compression."""
    return replace(manifest, storage={"format": format, "compression": compression}, files={})
