"""A shard: the unit in which a store is written, checked and mended."""

from dataclasses import dataclass

from featcache.names import COMMITS
from featcache.store.folder import Folder
from featcache.store.formats import format_of
from featcache.store.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Shard:
    """A run of rows of a split, with one file for each feature. It exists once its marker does.

    number: of the shard within its split, from 0. `len(shard)` is its number of rows.
    """

    folder: Folder
    manifest: Manifest
    split: str
    number: int

    def __str__(self) -> str:
        first, end = self.rows
        return f"split {self.split}, shard {self.number} (rows {first} to {end - 1})"

    def __len__(self) -> int:
        first, end = self.rows
        return end - first

    @property
    def rows(self) -> tuple[int, int]:
        """First row and end row."""
        return self.manifest.rows_of(self.split, self.number)

    @property
    def index(self) -> int:
        """Number of the shard among those of all splits, in order."""
        splits = list(self.manifest.splits)
        return sum(self.manifest.shards(split) for split in splits[: splits.index(self.split)]) + self.number

    @property
    def marker_name(self) -> str:
        """Name of the shard's marker within the store."""
        return f"{COMMITS}/{self.split}/{self.number:06d}{self.manifest.mark}.json"

    def file_name(self, feature: str) -> str:
        """Return the name of the file that holds the shard's rows of a feature, within the store."""
        axes = 1 + len(self.manifest.features[feature]["shape"])
        return format_of(self.manifest).shard_name(self.split, feature, self.number, axes)

    def file_bytes(self, feature: str) -> int:
        """Return the length of the file that holds the shard's rows of a feature, if it is not compressed."""
        spec, shard_rows = self.manifest.features[feature], self.manifest.splits[self.split]["shard_rows"]
        return format_of(self.manifest).shard_bytes(spec, shard_rows, len(self))


def all_shards(folder: Folder, manifest: Manifest) -> list[Shard]:
    """Return every shard of a store, in order, whether or not it is there."""
    return [
        Shard(folder, manifest, split, number) for split in manifest.splits for number in range(manifest.shards(split))
    ]
