"""The manifest: a store's identity, shapes and geometry, in manifest.json."""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypedDict

from featcache.errors import BadInput, nearest, shown
from featcache.feature import Feature, parse_feature
from featcache.names import COMMITS, MANIFEST
from featcache.store.dtype import STORED
from featcache.store.folder import Folder, open_folder
from featcache.store.manifest_fields import check_fields, check_names
from featcache.store.sealed import seal, unseal

FORMAT = "featcache-store"
VERSION = 1

SHARD_BYTES = 128 << 20
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 256
# What `extract` takes where its command line does not say.
USUAL = {"dtype": "float16", "precision": "float32"}


class Geometry(TypedDict):
    """The rows of a split, and how many of them a shard has; the last shard may have fewer."""

    rows: int
    shard_rows: int


class FeatureSpec(TypedDict):
    """The shape of one row of a feature, its dtype (one of STORED), and how many rows a chunk has.

    A chunk is a run of rows with a checksum of its own; a shard is made of whole chunks.
    """

    shape: list[int]
    dtype: str
    chunk_rows: int


class Storage(TypedDict):
    """The format, zarr or hdf5, and the compression: zstd, blosc or None."""

    format: str
    compression: str | None


class FileEntry(TypedDict):
    """Length and checksum of a file."""

    bytes: int
    crc32: int


@dataclass(frozen=True, repr=False)
class Manifest:
    """The contents of manifest.json.

    identity: what the features depend on; its hash is the store's id. splits: by name. A view of a split is one of
    them, see view_name. features: by name. aliases: layer names for people to module paths. classes, task: those of the
    dataset. compute: {device, threads, batch_size, ...} of the extraction, fixed for the store because they can change
    the last bits of a feature. files: all files but the shards and markers, by name.

    What is added to a store later has a manifest of its own, an addition: its features and splits are those whose shards
    it names, and its identity has a field `adds`. after: the id of the store to which it was added; None until it is
    whole, and in a store's first manifest. See featcache.store.additions.
    """

    identity: dict[str, Any]
    splits: dict[str, Geometry]
    features: dict[str, FeatureSpec]
    aliases: dict[str, str]
    classes: list[str]
    task: str
    compute: dict[str, Any]
    storage: Storage
    files: dict[str, FileEntry]
    after: str | None = None

    def __repr__(self) -> str:
        return f"Manifest(id {self.id[:8]}, {', '.join(self.features)})"

    @property
    def id(self) -> str:
        """sha256 (hex) of the identity, independent of the order of its keys."""
        return identity_hash(self.identity)

    @property
    def is_addition(self) -> bool:
        """Whether this is the manifest of an addition."""
        return "adds" in self.identity

    @property
    def mark(self) -> str:
        """What the names of an addition's manifest and markers have in them; empty for a store's first manifest."""
        return f"-{self.id[:8]}" if self.is_addition else ""

    @property
    def file_name(self) -> str:
        """Name of the manifest's file in the store."""
        return f"addition{self.mark}.json" if self.is_addition else MANIFEST

    def shards(self, split: str) -> int:
        """Return the number of shards of a split."""
        return -(-self.splits[split]["rows"] // self.splits[split]["shard_rows"])

    def rows_of(self, split: str, number: int) -> tuple[int, int]:
        """Return the first row and the end row of a shard, given by its number within the split."""
        size = self.splits[split]["shard_rows"]
        return number * size, min((number + 1) * size, self.splits[split]["rows"])

    def row_bytes(self, feature: str | Feature) -> int:
        """Return the bytes of one row of a feature, uncompressed."""
        spec = self.features[str(feature)]
        return math.prod(spec["shape"]) * STORED[spec["dtype"]].itemsize

    def feature(self, name: object, path: str | None = None) -> Feature:
        """Return the feature of a name, aliases resolved. path: of the store. Raises BadInput if it does not hold it."""
        feature = parse_feature(name, self.aliases)
        if str(feature) not in self.features:
            hint = nearest(feature, self.features)
            raise BadInput(
                f"the store holds no feature {str(feature)!r}{hint} (it holds {', '.join(self.features)}); if the backbone "
                f"has that layer: {self._extract_with(feature, path)}"
            )
        return feature

    def _extract_with(self, feature: Feature, path: str | None) -> str:
        """Return the command that adds a further feature to the store at a path, as far as the identity says it."""
        identity = self.identity
        images = identity.get("preprocessing", {})
        options = {"arch": identity.get("arch"), "dataset": identity.get("dataset", {}).get("name")}
        options |= {
            name: images.get(name.replace("-", "_")) for name in ("size", "resize", "short-side", "interpolation")
        }
        options |= {"views": identity.get("views", {}).get("count")}
        options |= {name: identity.get(name) for name in ("dtype", "precision") if identity.get(name) != USUAL[name]}
        options |= {"store": path and shlex.quote(path)}
        words = [f"--{name} {value}" for name, value in options.items() if value]
        # The brackets of a grid mean something to a shell.
        features = shlex.quote(",".join([*self.features, str(feature)]))
        return " ".join(["featcache extract --backbone CKPT", *words, f"--features {features}"])

    def to_bytes(self) -> bytes:
        """Return the bytes of the manifest's file."""
        content = asdict(self)
        if not self.is_addition:
            del content["after"]
        return seal({"format": FORMAT, "version": VERSION, "id": self.id} | content)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of an identity, a mapping of JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def plan(
    identity: dict[str, Any],
    rows: Mapping[str, int],
    shapes: Mapping[Feature, tuple[int, ...]],
    dtype: str,
    aliases: Mapping[str, str],
    classes: Iterable[str],
    task: str,
    compute: dict[str, Any],
    storage: Storage,
    most_rows: int | None = None,
) -> Manifest:
    """Lay out a store: the sizes of shards and chunks follow from the bytes of a row.

    rows: of each split and view. shapes: of one row of each feature. dtype: one of STORED. most_rows: of a
    shard, None for as many as make SHARD_BYTES. The others are those of Manifest, whose `files` stay empty here. All features of a split have the same number of rows per shard; the rows
    of a chunk are a power of two, so that chunks divide a shard.
    """
    features: dict[str, FeatureSpec] = {}
    row_bytes, most_chunk_rows = 0, min(CHUNK_ROWS, _power_of_two_below(most_rows or CHUNK_ROWS))
    for feature, shape in shapes.items():
        size = math.prod(shape) * STORED[dtype].itemsize
        chunk_rows = min(most_chunk_rows, _power_of_two_below(CHUNK_BYTES // size))
        features[str(feature)] = {"shape": list(shape), "dtype": dtype, "chunk_rows": chunk_rows}
        row_bytes += size
    unit = max(f["chunk_rows"] for f in features.values())
    full = max(min(SHARD_BYTES // row_bytes, most_rows or SHARD_BYTES) // unit, 1) * unit
    splits: dict[str, Geometry] = {
        split: {"rows": count, "shard_rows": min(full, -(-count // unit) * unit)} for split, count in rows.items()
    }
    check_names(splits, features, identity["dataset"]["splits"] if "adds" in identity else ())
    return Manifest(identity, splits, features, dict(aliases), list(classes), task, compute, storage, {})


def _power_of_two_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def read_manifest(place: object) -> Manifest:
    """Read the manifest of a store. place: path, URL or Folder. Raises BadInput if it is damaged or not there."""
    folder = open_folder(place)
    try:
        data = folder.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        entries = folder.names()
        if MANIFEST in entries:
            raise BadInput(f"damaged manifest {folder}/{MANIFEST}: it is no file; {remedy(folder)}") from None
        if COMMITS in entries:
            raise BadInput(
                f"store {folder} has lost its {MANIFEST}: run the same extract again, which makes it anew"
            ) from None
        if not entries and (folder.remote or not os.path.exists(folder.path)):
            raise BadInput(f"store not found: {folder}") from None
        raise BadInput(f"not a featcache store (it has no {MANIFEST}): {folder}") from None
    return parse_manifest(data, folder)


def parse_manifest(data: bytes, folder: Folder, name: str = MANIFEST) -> Manifest:
    """Turn the bytes of a manifest into a Manifest. Raises BadInput for damage and for other versions.

    name: of its file, which is manifest.json, or that of an addition.
    """
    where, known = f"{folder}/{name}", [field.name for field in fields(Manifest)]
    if name == MANIFEST:
        known.remove("after")
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
    if content.keys() != {"format", "version", "id", *known}:
        raise BadInput(f"damaged manifest {where}: its fields are not those of version {VERSION}")
    try:
        check_fields(content)
    except BadInput as error:
        raise BadInput(f"manifest {where} is not one that featcache wrote: {error.message}") from None
    manifest = Manifest(**{field: content[field] for field in known})
    if manifest.id != content["id"]:
        raise BadInput(f"damaged manifest {where}: its identity does not hash to its id")
    if manifest.file_name != name:
        raise BadInput(f"damaged manifest {where}: it is that of {manifest.file_name}; {remedy(folder)}")
    return manifest


def remedy(folder: Folder) -> str:
    """Return what to do about damage, which an error ends with."""
    return f"run featcache verify {folder} --repair, then the same extract again"


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return lines that name the fields in which two identities differ, as `field: old -> new`."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


def view_name(split: str, view: int) -> str:
    """Return the name of a view of a split, such as train@1; view 0 is the split itself."""
    return f"{split}@{view}" if view else split


def split_of(name: str) -> str:
    """Return the name of the split that a view, given by its name, is of; for a split, its own."""
    return name.partition("@")[0]


def feature_of(name: str) -> Feature:
    """Turn a manifest's feature name back into a Feature."""
    layer, _, reduction = name.rpartition(":")
    return Feature(layer, reduction)


def stored_as(manifest: Manifest, format: str, compression: str | None) -> Manifest:
    """Return the manifest of the same store in another format or compression; its `files` are still empty."""
    return replace(manifest, storage={"format": format, "compression": compression}, files={})
