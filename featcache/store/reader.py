"""Opening a store: its splits, their features and records."""

from functools import cached_property, partial

import numpy as np

from featcache.errors import BadInput, nearest
from featcache.store.feature_array import FeatureArray
from featcache.store.folder import open_folder
from featcache.store.formats import FORMATS
from featcache.store.manifest import read_file, read_manifest, remedy, split_of, view_group
from featcache.store.marker import committed, committed_marker, digests_of, ids_sha256_of
from featcache.store.records import RECORD_ARRAYS, VIEW_ARRAYS, ids_of, wrong_with


def open_store(path):
    """Open a finished store for reading: `open_store(p)["train"]["last:pooled"][:]`.

    path: a folder, or a URL such as s3://bucket/x.zarr. All files but the shards are compared with the
    manifest's checksums now, shards when they are read, see FeatureArray. Raises BadInput if there is no
    store, it is damaged, or shards are missing (named).
    """
    store = Store(path)
    for split in store.manifest.splits:
        total, there = store.manifest.shards(split), committed(store.folder, store.manifest, split)
        if len(there) < total:
            missing = min(set(range(total)) - there)
            first, end = store.manifest.rows_of(split, missing)
            raise BadInput(
                f"store {path} is incomplete: split {split} lacks {total - len(there)} of {total} shards, "
                f"the first is shard {missing} (rows {first} to {end - 1}); run the same extract again to finish it"
            )
    store.folder.each(lambda name: len(read_file(store.folder, store.manifest, name)), store.manifest.files)
    for split in store.manifest.splits:
        store[split].labels  # noqa: B018 -- to see whether they are labels of its classes
    return store


class Store:
    """A store. Index it by split; see Split. Attributes: path (as given), manifest, id, classes, task."""

    def __init__(self, path):
        self.folder = open_folder(path)
        self.path = str(self.folder)
        self.manifest = read_manifest(self.folder)
        self.id = self.manifest.id
        self.classes = tuple(self.manifest.classes)
        self.task = self.manifest.task
        self._splits = {split: Split(self, split) for split in self.manifest.splits}

    def __repr__(self):
        rows = ", ".join(f"{split} {len(self[split])}" for split in self.splits)
        return f"Store({self.path!r}, id {self.id[:8]}, {rows} images)"

    @property
    def splits(self):
        """Names of the splits, in order, without views."""
        return tuple(split for split in self._splits if split_of(split) == split)

    def __getitem__(self, split):
        if split not in self._splits:
            raise BadInput(
                f"store {self.path} has no split {split!r}{nearest(split, self.splits)} (it has {', '.join(self.splits)})"
            )
        return self._splits[split]


class Split:
    """One split of a store: its features by name, and its ids, labels, boxes and sizes.

    `split["layer4:spatial"]` is array-like; aliases such as `last:pooled` work too. A view of a split
    is one too, with features of its own; its sizes and boxes are those of the original images.
    """

    def __init__(self, store, name):
        self.store = store
        self.name = name
        # {feature: which of its chunks were found to fit their checksums}, for all arrays of a feature.
        self._checked = {}

    def __getstate__(self):
        # Another process looks again at what it reads.
        return self.__dict__ | {"_checked": {}}

    def __repr__(self):
        return f"Split({self.name!r} of store {self.store.path!r}, {len(self)} images)"

    def __len__(self):
        return self.store.manifest.splits[self.name]["rows"]

    def __getitem__(self, feature):
        manifest = self.store.manifest
        feature = manifest.feature(feature)
        checked = self._checked.setdefault(str(feature), {})
        return FeatureArray(self.store.folder, manifest, self.name, feature, self._ids_sha256, checked)

    @cached_property
    def _ids_sha256(self):
        """ids_sha256 of each shard, as its marker must have it."""
        manifest = self.store.manifest
        rows = [manifest.rows_of(self.name, shard) for shard in range(manifest.shards(self.name))]
        return ids_sha256_of(self._array("ids"), rows)

    @property
    def views(self):
        """How many augmented views the split has, beside itself."""
        return sum(split_of(group) == split_of(self.name) for group in self.store.manifest.splits) - 1

    def view(self, number):
        """View `number` of the split; 0 is the split itself. Raises BadInput if there is none."""
        if not 0 <= number <= self.views:
            raise BadInput(
                f"split {split_of(self.name)} of store {self.store.path} has {self.views} views, no {number}"
            )
        return self.store[view_group(split_of(self.name), number)]

    @property
    def _names(self):
        return RECORD_ARRAYS if split_of(self.name) == self.name else VIEW_ARRAYS

    def _array(self, name):
        folder, manifest = self.store.folder, self.store.manifest
        group = self.name if name in self._names else split_of(self.name)
        try:
            read = partial(read_file, folder, manifest)
            array = FORMATS[manifest.storage["format"]].read_array(read, group, name)
            wrong = wrong_with(name, array, len(self), len(self.store.classes), self.store.task)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            wrong = error
        if wrong is not None:
            raise BadInput(f"damaged array {group}/{name} of store {folder}: {wrong}; {remedy(folder)}")
        return array

    def arrays(self):
        """The small arrays of the split, {name: array}."""
        return {name: self._array(name) for name in self._names}

    @cached_property
    def ids(self):
        """Ids of the rows: list of str."""
        try:
            return ids_of(self._array("ids"))
        except UnicodeDecodeError as error:
            folder = self.store.folder
            raise BadInput(f"damaged array {self.name}/ids of store {folder}: {error}; {remedy(folder)}") from None

    @cached_property
    def digests(self):
        """uint8 [N, 16] that tell the images by the bytes of their files; None if a shard was written without."""
        folder, manifest = self.store.folder, self.store.manifest
        shards = range(manifest.shards(self.name))
        markers = folder.each(lambda shard: committed_marker(folder, manifest, self.name, shard), shards)
        known = [digests_of(marker) for marker in markers]
        return None if any(part is None for part in known) else np.concatenate(known)

    @cached_property
    def labels(self):
        """int8 [N, C] with 1, 0, -1 (only difficult) if multi-label, int64 [N] if single-label."""
        return self._array("labels")

    @cached_property
    def augmentation(self):
        """Of a view, int32 [N, 5]: top, left, height, width of the crop in pixels of the original image, flip."""
        if split_of(self.name) == self.name:
            raise BadInput(f"split {self.name} is not augmented; its views are: see Split.view")
        return self._array("augmentation")

    @cached_property
    def sizes(self):
        """int32 [N, 2]: height and width of the original images in pixels."""
        return self._array("sizes")

    @cached_property
    def boxes(self):
        """For each row (boxes float32 [M, 4] as x0 y0 x1 y1 in pixels, classes [M], difficult bool [M])."""
        offsets, folder = self._array("box_offsets"), self.store.folder
        columns = [self._array("boxes"), self._array("box_classes"), self._array("box_difficult").astype(bool)]
        if any(len(column) != offsets[-1] for column in columns):
            raise BadInput(f"damaged boxes of split {self.name} of store {folder}: not {offsets[-1]}; {remedy(folder)}")
        bounds = offsets[1:-1]
        return list(zip(*(np.split(column, bounds) for column in columns), strict=True))
