"""Small stores of random features, written as `extract` writes them, but with no images and no backbone."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from featcache.datasets import Dataset, Record
from featcache.feature import Feature
from featcache.store import manifest as manifest_module
from featcache.store.additions import addition, merge
from featcache.store.folder import open_folder
from featcache.store.formats import choose_format
from featcache.store.growing import begin_addition, publish, restore, whole_parts
from featcache.store.manifest import plan
from featcache.store.reader import Store
from featcache.store.records import record_arrays, with_axes
from featcache.store.shard import Shard
from featcache.store.writer import create_store, missing_shards, put_shard

ROWS = 23
# What indexes an array [ROWS, 3, ...].
index = st.one_of(
    st.integers(-ROWS, ROWS - 1),
    st.slices(ROWS),
    st.lists(st.integers(-ROWS, ROWS - 1), max_size=12).map(lambda v: np.array(v, dtype=np.int64)),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
    st.tuples(st.slices(ROWS), st.integers(0, 2)),
    st.tuples(st.integers(0, ROWS - 1), st.slices(3), st.integers(0, 1)),
    st.just(np.array([[0, 5], [22, -1]])),
    st.just(...),
)


def write_store(
    path,
    dtype="float16",
    rows=ROWS,
    single=False,
    chunk_rows=4,
    shard_bytes=256,
    row=(3, 2, 2),
    compression=None,
    known=True,
):
    """Write a small store of random features with several shards and chunks; return the features as stored."""
    records = tuple(
        Record(
            id=f"picture-{n}é",
            image=None,
            image_bytes=n,
            height=10 + n,
            width=20,
            labels=n % 3 if single else np.array([1, 0, -1], np.int8),
            boxes=np.full((n % 3, 4), n, np.float32),
            box_classes=np.zeros(n % 3, np.int64),
            box_difficult=np.zeros(n % 3, bool),
        )
        for n in range(rows)
    )
    data = Dataset("toy", ("a", "b", "c"), "single-label" if single else "multi-label", {"train": records})
    shapes = {Feature("layer4", "pooled"): row[:1], Feature("layer4", "spatial"): row}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "CHUNK_ROWS", chunk_rows)
        patch.setattr(manifest_module, "SHARD_BYTES", shard_bytes)
        identity = {"arch": "toy", "preprocessing": {"size": 8}, "dataset": {"name": "toy", "splits": {}}}
        plan_ = plan(
            identity,
            {"train": rows},
            shapes,
            dtype,
            {"last": "layer4"},
            data.classes,
            data.task,
            compute={"device": "cpu", "threads": 1, "batch_size": 8},
            storage={"format": choose_format(None, path), "compression": compression},
        )
    folder = open_folder(path)
    plan_ = create_store(folder, plan_, {"train": with_axes(record_arrays(data, "train"))})
    random = np.random.default_rng(0)
    features = {str(f): random.normal(size=(rows, *shape)).astype(np.float32) for f, shape in shapes.items()}
    if dtype == "bfloat16":
        features = {n: torch.from_numpy(f).bfloat16().view(torch.uint16).numpy() for n, f in features.items()}
    else:
        features = {n: f.astype(dtype) for n, f in features.items()}
    digests = random.integers(0, 256, (rows, 16), np.uint8)
    for shard in range(plan_.shards("train")):
        first, end = plan_.rows_of("train", shard)
        ids = [r.id for r in records[first:end]]
        rows_of_shard = {n: f[first:end] for n, f in features.items()}
        put_shard(Shard(folder, plan_, "train", shard), ids, rows_of_shard, digests[first:end] if known else None)
    return features


def write_features(path, splits, classes):
    """Write a float32 store of given features, in chunks of 4 rows. splits: {name: (ids, labels, pooled [N, D])}."""
    single = next(iter(splits.values()))[1].ndim == 1
    records = {
        split: tuple(
            Record(id=i, image=None, image_bytes=1, height=8, width=8, labels=int(y) if single else y,
                   boxes=np.zeros((0, 4), np.float32), box_classes=np.zeros(0, np.int64), box_difficult=np.zeros(0, bool))
            for i, y in zip(ids, labels, strict=True)
        )
        for split, (ids, labels, _) in splits.items()
    }  # fmt: skip
    data = Dataset("toy", tuple(classes), "single-label" if single else "multi-label", records)
    feature = Feature("layer4", "pooled")
    shapes = {feature: next(iter(splits.values()))[2].shape[1:]}

    def rows(split, first, end):
        return {str(feature): splits[split][2][first:end].astype(np.float32)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "CHUNK_ROWS", 4)
        write_records(path, data, shapes, "float32", rows, {"size": 8})
    return path


def write_records(path, data, shapes, dtype, rows, preprocessing):
    """Write a store of a Dataset without images. rows(split, first, end): {feature: array} of these rows."""
    plan_ = plan(
        {
            "arch": "toy",
            "weights_sha256": "0",
            "preprocessing": preprocessing,
            "dataset": {"name": "toy", "splits": {}},
        },
        {split: len(records) for split, records in data.splits.items()},
        shapes,
        dtype,
        {"last": "layer4"},
        data.classes,
        data.task,
        compute={"device": "cpu", "threads": 1, "batch_size": 8},
        storage={"format": choose_format(None, path), "compression": None},
    )
    folder = open_folder(path)
    plan_ = create_store(folder, plan_, {split: with_axes(record_arrays(data, split)) for split in data.splits})
    for split, records in data.splits.items():
        for shard in range(plan_.shards(split)):
            first, end = plan_.rows_of(split, shard)
            values = rows(split, first, end)
            # Other features are other images.
            each = zip(*values.values(), strict=True)
            digests = [hashlib.md5(b"".join(row.tobytes() for row in own)).digest() for own in each]
            known = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
            put_shard(Shard(folder, plan_, split, shard), [r.id for r in records[first:end]], values, known)


class Rows(torch.utils.data.Dataset):
    """A feature as a map-style dataset, for worker processes."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, row):
        return torch.from_numpy(self.array[row])


def grow_store(path):
    """Add layer3:pooled, a random feature, to a store of write_store, as `extract` adds it; go on if it was begun."""
    folder = open_folder(path)
    parts = whole_parts(folder)
    store, feature = merge(parts), Feature("layer3", "pooled")
    if str(feature) in store.features:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "CHUNK_ROWS", 2)
        patch.setattr(manifest_module, "SHARD_BYTES", 32)
        planned = plan(
            addition(store.identity, [str(feature)], ["train"], {}),
            {"train": store.splits["train"]["rows"]},
            {feature: (5,)},
            "float16",
            store.aliases,
            store.classes,
            store.task,
            store.compute,
            store.storage,
        )
    folder.sweep()
    begun = begin_addition(folder, planned)
    split = Store(folder)["train"]
    arrays = {"train": with_axes(split.arrays())}
    restore(folder, parts, arrays)
    values = np.random.default_rng(1).normal(size=(len(split), 5)).astype(np.float16)
    for shard in missing_shards(folder, begun):
        first, end = shard.rows
        put_shard(shard, split.ids[first:end], {str(feature): values[first:end]})
    publish(folder, begun, arrays)


def write_masked(path, images, masks, width, classes):
    """Write a float16 store of `images` images with random features of `masks` masked variants each; return it."""
    records = tuple(
        Record(id=f"{n}", image=None, image_bytes=1, height=8, width=8, labels=np.zeros(classes, np.int8))
        for n in range(images)
    )
    data = Dataset("toy", tuple(map(str, range(classes))), "multi-label", {"test": records})
    feature = Feature("layer4", "pooled")
    identity = {"arch": "toy", "preprocessing": {"size": 8}, "dataset": {"name": "toy", "splits": {}}}
    plan_ = plan(
        identity | {"masks": {"type": "rise", "masks": masks}}, {"test": images}, {feature: (masks, width)}, "float16",
        {}, data.classes, data.task, {"device": "cpu", "threads": 1, "batch_size": 8},
        {"format": choose_format(None, path), "compression": None}, most_rows=1,
    )  # fmt: skip
    folder, random = open_folder(path), np.random.default_rng(0)
    plan_ = create_store(folder, plan_, {"test": with_axes(record_arrays(data, "test"))})
    for shard in missing_shards(folder, plan_):
        rows = random.normal(size=(1, masks, width)).astype(np.float16)
        put_shard(shard, [records[shard.number].id], {str(feature): rows})
    return Store(path)
