"""What a store is a store of: its identity, shapes and geometry, in manifest.json."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from featcache.errors import BadInput
from featcache.feature import Feature, parse_feature

FILE = "manifest.json"
FORMAT = "featcache-store"
VERSION = 1

SHARD_BYTES = 128 << 20
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 256
DTYPE_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    identity: what the features depend on; its hash is the store's id. splits: name to {rows,
    shard_rows}. features: name to {shape (of one row), dtype, chunk_rows}. aliases: layer names for
    people to module paths. classes, task: of the dataset. batch_size: images per forward pass,
    fixed for the store because it can change the last bits of a feature.
    """

    identity: dict
    splits: dict
    features: dict
    aliases: dict
    classes: list
    task: str
    batch_size: int

    @property
    def id(self):
        """sha256 (hex) of the identity, independent of the order of its keys."""
        return identity_hash(self.identity)

    def shards(self, split):
        """Number of shards of a split."""
        return -(-self.splits[split]["rows"] // self.splits[split]["shard_rows"])

    def rows_of(self, split, shard):
        """First row and end row of a shard."""
        size = self.splits[split]["shard_rows"]
        return shard * size, min((shard + 1) * size, self.splits[split]["rows"])

    def feature(self, name):
        """Resolve a feature's name or alias. Raises BadInput if the store does not hold it."""
        feature = parse_feature(name, self.aliases)
        if str(feature) not in self.features:
            raise BadInput(f"the store holds no feature {str(feature)!r}; it holds {', '.join(self.features)}")
        return feature

    def to_json(self):
        """Return the text of manifest.json."""
        head = {"format": FORMAT, "version": VERSION, "id": self.id}
        return json.dumps(head | asdict(self), indent=2) + "\n"


def identity_hash(identity):
    """sha256 (hex) of an identity, a dict of JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def plan(identity, rows, shapes, dtype, aliases, classes, task, batch_size):
    """Lay out a store: shard and chunk sizes follow from the bytes of a row.

    rows: {split: N}. shapes: {Feature: shape of one row}. dtype: numpy name. All features of a
    split have the same rows per shard; chunks are powers of two of rows, so that they divide it.
    """
    features, row_bytes = {}, 0
    for feature, shape in shapes.items():
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        chunk_rows = min(CHUNK_ROWS, _power_of_two_below(CHUNK_BYTES // size))
        features[str(feature)] = {"shape": list(shape), "dtype": dtype, "chunk_rows": chunk_rows}
        row_bytes += size
    unit = max(f["chunk_rows"] for f in features.values())
    full = max(SHARD_BYTES // row_bytes // unit, 1) * unit
    splits = {
        split: {"rows": count, "shard_rows": min(full, -(-count // unit) * unit)} for split, count in rows.items()
    }
    return Manifest(identity, splits, features, dict(aliases), list(classes), task, batch_size)


def _power_of_two_below(number):
    return 1 << (max(number, 1).bit_length() - 1)


def read_manifest(path):
    """Read the manifest of the store at `path`. Raises BadInput if there is none or it is damaged."""
    file = Path(path) / FILE
    if not Path(path).exists():
        raise BadInput(f"store not found: {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"not a featcache store (it has no {FILE}): {path}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"damaged manifest {file}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"damaged manifest {file}: it does not say format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise BadInput(
            f"store {path} has format version {content.get('version')}; this featcache reads version {VERSION}"
        )
    try:
        manifest = Manifest(**{k: v for k, v in content.items() if k not in ("format", "version", "id")})
    except TypeError as error:
        raise BadInput(f"damaged manifest {file}: {error}") from None
    if manifest.id != content.get("id"):
        raise BadInput(f"damaged manifest {file}: its identity does not hash to its id")
    return manifest


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


def feature_of(name):
    """Turn a manifest's feature name back into a Feature."""
    layer, _, reduction = name.rpartition(":")
    return Feature(layer, reduction)
