"""Opening a store: its splits, their features and records."""

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from featcache.errors import BadInput, nearest
from featcache.feature import Feature
from featcache.store.additions import ids_of_parts, merge, part_of, read_file, read_parts
from featcache.store.feature_array import FeatureArray
from featcache.store.folder import Folder, open_folder
from featcache.store.formats import format_of
from featcache.store.manifest import Manifest, remedy, split_of, view_name
from featcache.store.marker import committed, digests_of, ids_sha256, read_marker
from featcache.store.records import RECORD_ARRAYS, VIEW_ARRAYS, ids_of, wrong_with
from featcache.store.shard import Shard
from featcache.store.sources import Checked


def open_store(path: str | os.PathLike[str]) -> "Store":
    """Open a finished store for reading.

    path: a folder, or a URL such as s3://bucket/x.zarr. All files but the shards are compared with the manifest's
    checksums now; shards are when they are read, see FeatureArray. Raises BadInput if there is no store, if it is
    damaged, or if shards are missing, which it names.

        store = featcache.open_store("voc.zarr")
        features, labels = store["train"]["last:pooled"][:], store["train"].labels  # [N, 2048], [N, 20]
    """
    store = Store(path)
    for part, split in [(manifest, split) for manifest in store.parts for split in manifest.splits]:
        total, done = part.shards(split), committed(store.folder, part, split)
        if len(done) < total:
            missing = min(set(range(total)) - done)
            first, end = part.rows_of(split, missing)
            raise BadInput(
                f"store {path} is incomplete: split {split} lacks {total - len(done)} of {total} shards, "
                f"the first is shard {missing} (rows {first} to {end - 1}); run the same extract again to finish it"
            )
    store.folder.each(lambda name: len(read_file(store.folder, store.manifest, name)), store.manifest.files)
    for split in store.manifest.splits:
        store[split].labels  # noqa: B018 -- reading them checks that they are labels of its classes
    return store


class Store:
    """A store, whole or not; open_store opens a finished one.

    Attributes: path (as given), folder, manifest (of all that it holds), parts (the manifests of its first extraction
    and of each addition), id, classes, task. Index it by the name of a split, see Split.

        store.splits, store.classes  # ("train", "val", "test"), ("aeroplane", ...)
        store["train"]["layer4:pooled"]  # a FeatureArray
    """

    def __init__(self, path: str | os.PathLike[str] | Folder, parts: Sequence[Manifest] = ()) -> None:
        """parts: those to read, by default all."""
        self.folder = open_folder(path)
        self.path = str(self.folder)
        self.parts = parts or read_parts(self.folder)
        self.manifest = merge(self.parts)
        self.id = self.manifest.id
        self.classes = tuple(self.manifest.classes)
        self.task = self.manifest.task
        self._splits = {split: Split(self, split) for split in self.manifest.splits}

    def __repr__(self) -> str:
        rows = ", ".join(f"{split} {len(self[split])}" for split in self.splits)
        return f"Store({self.path!r}, id {self.id[:8]}, {rows} images)"

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids that the store has had while it grew, the present one last."""
        return ids_of_parts(self.parts)

    def known_as(self, id: str) -> "Store":
        """Return the store as it is known by one of its ids: with the splits and views of then, and all features.

        What a run of then has read is determined by that id, and so is any other feature of those splits: it is of the
        same backbone and the same images.
        """
        then = merge(self.parts[: self.ids.index(id) + 1])
        store = copy(self)
        store.id = id
        store._splits = {split: Split(store, split) for split in then.splits}
        store.manifest = replace(self.manifest, splits=then.splits)
        return store

    def feature(self, name: object) -> Feature:
        """Return the feature of a name, aliases resolved. Raises BadInput, with the command that adds it, if there is none."""
        return self.manifest.feature(name, self.path)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order, without views."""
        return tuple(split for split in self._splits if split_of(split) == split)

    def __getitem__(self, split: str) -> "Split":
        if split not in self._splits:
            raise BadInput(
                f"store {self.path} has no split {split!r}{nearest(split, self.splits)} (it has {', '.join(self.splits)})"
            )
        return self._splits[split]


class Split:
    """One split of a store: its features by name, and its ids, labels, boxes and sizes.

    Index it by a feature, whose layer may be an alias, for a FeatureArray. A view of a split is a Split too, with
    features of its own; its sizes and boxes are those of the original images.

        train = store["train"]
        train["last:spatial"], train.ids, train.labels, train.view(1)["last:spatial"]
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        # By feature, which of its chunks are known to fit their checksums; all arrays of a feature share this.
        self._checked: dict[str, Checked] = {}
        # By the id of a part, see _ids_of_shards.
        self._ids_sha256: dict[str, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process checks again what it reads.
        return self.__dict__ | {"_checked": {}}

    def __repr__(self) -> str:
        return f"Split({self.name!r} of store {self.store.path!r}, {len(self)} images)"

    def __len__(self) -> int:
        return self.store.manifest.splits[self.name]["rows"]

    def __getitem__(self, name: object) -> FeatureArray:
        feature = self.store.feature(name)
        part = part_of(self.store.parts, self.name, str(feature))
        checked = self._checked.setdefault(str(feature), {})
        return FeatureArray(self.store.folder, part, self.name, feature, self._ids_of_shards(part), checked)

    def _ids_of_shards(self, part: Manifest) -> list[str]:
        """Return ids_sha256 of each shard of a part of the store, as its marker must have it."""
        if part.id not in self._ids_sha256:
            ids = self._array("ids")
            bounds = (part.rows_of(self.name, number) for number in range(part.shards(self.name)))
            self._ids_sha256[part.id] = [ids_sha256(ids[first:end]) for first, end in bounds]
        return self._ids_sha256[part.id]

    @property
    def views(self) -> int:
        """How many augmented views the split has, besides itself."""
        return sum(split_of(name) == split_of(self.name) for name in self.store.manifest.splits) - 1

    def view(self, number: int) -> "Split":
        """Return a view of the split by its number; 0 is the split itself. Raises BadInput if there is none."""
        if not 0 <= number <= self.views:
            raise BadInput(
                f"split {split_of(self.name)} of store {self.store.path} has {self.views} views, no {number}"
            )
        return self.store[view_name(split_of(self.name), number)]

    @property
    def _names(self) -> tuple[str, ...]:
        return RECORD_ARRAYS if split_of(self.name) == self.name else VIEW_ARRAYS

    def _array(self, name: str) -> np.ndarray:
        folder, manifest = self.store.folder, self.store.manifest
        # A view has no array of its own where its split's holds for it too.
        split = self.name if name in self._names else split_of(self.name)
        reason: str | Exception | None
        try:
            array = format_of(manifest).read_array(partial(read_file, folder, manifest), split, name)
            reason = wrong_with(name, array, len(self), len(self.store.classes), self.store.task)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = error
        if reason is not None:
            raise BadInput(f"damaged array {split}/{name} of store {folder}: {reason}; {remedy(folder)}")
        return array

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the small arrays of the split, {name: array}."""
        return {name: self._array(name) for name in self._names}

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the rows."""
        try:
            return ids_of(self._array("ids"))
        except UnicodeDecodeError as error:
            folder = self.store.folder
            raise BadInput(f"damaged array {self.name}/ids of store {folder}: {error}; {remedy(folder)}") from None

    @cached_property
    def digests(self) -> np.ndarray | None:
        """Digests of the image files, uint8 [N, 16], see featcache.digest; None if a shard was written without them."""
        return self.digests_of_rows(0, len(self))

    def digests_of_rows(self, first: int, end: int) -> np.ndarray | None:
        """Return the digests of some rows, uint8 [n, 16], as `digests` does."""
        part = next(part for part in self.store.parts if self.name in part.splits)
        shard_rows = part.splits[self.name]["shard_rows"]
        numbers = range(first // shard_rows, -(-end // shard_rows))
        shards = [Shard(self.store.folder, part, self.name, number) for number in numbers]
        digests = [digests_of(marker) for marker in self.store.folder.each(read_marker, shards)]
        known = [own for own in digests if own is not None]
        start = numbers.start * shard_rows
        return np.concatenate(known)[first - start : end - start] if known and len(known) == len(digests) else None

    @cached_property
    def labels(self) -> np.ndarray:
        """int8 [N, C] of 1, 0 and -1 (present only as difficult) if multi-label, int64 [N] if single-label."""
        return self._array("labels")

    @cached_property
    def augmentation(self) -> np.ndarray:
        """The crops of a view, int32 [N, 5]: top, left, height and width in pixels of the original image, and flip."""
        if split_of(self.name) == self.name:
            raise BadInput(f"split {self.name} is not augmented; its views are: see Split.view")
        return self._array("augmentation")

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width of the original images in pixels."""
        return self._array("sizes")

    @cached_property
    def boxes(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each row, (boxes float32 [M, 4] as x0 y0 x1 y1 in pixels, classes [M], difficult bool [M])."""
        offsets, folder = self._array("box_offsets"), self.store.folder
        columns = [self._array("boxes"), self._array("box_classes"), self._array("box_difficult").astype(bool)]
        if any(len(column) != offsets[-1] for column in columns):
            raise BadInput(f"damaged boxes of split {self.name} of store {folder}: not {offsets[-1]}; {remedy(folder)}")
        bounds = offsets[1:-1]
        return list(zip(*(np.split(column, bounds) for column in columns), strict=True))
