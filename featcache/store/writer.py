"""Making a store and filling its shards, safe against a kill at any moment."""

import fcntl
import hashlib
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from featcache.atomic import PARTIAL, sync_folder, write_whole
from featcache.errors import BadInput
from featcache.store.manifest import FILE, difference, feature_of, read_manifest
from featcache.store.shard import commit_shard, marker_path, read_marker, shard_path, write_shard


@contextmanager
def locked(folder, waiting):
    """Hold an advisory lock on a folder; say `waiting` first if another process has it.

    On file systems without locks this does nothing: commits are all or nothing either way.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(waiting, err=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def create_store(path, manifest, dataset):
    """Make the folder of a store with all but its shards, all or nothing.

    dataset: the Dataset; its ids, labels, boxes and sizes go into the store. A store of the same id
    that is there already is left as it is. Raises BadInput if another one is in the way.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path.parent}: {error.strerror}") from None
    with locked(path.parent, f"waiting: another process is making a store in {path.parent}"):
        if path.exists():
            check_same(path, manifest)
            return
        building = path.with_name(path.name + PARTIAL)
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
        except OSError as error:
            raise BadInput(f"cannot write into {path.parent}: {error.strerror}") from None
        _write_metadata(building, manifest, dataset)
        for split in manifest.splits:
            (building / "commits" / split).mkdir(parents=True)
        write_whole(building / FILE, manifest.to_json())
        for folder, _, files in os.walk(building):
            for file in files:
                descriptor = os.open(Path(folder, file), os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            sync_folder(folder)
        os.rename(building, path)
        sync_folder(path.parent)


def check_same(path, manifest):
    """Raise BadInput, naming the fields that differ, if the store at `path` has another identity."""
    there = read_manifest(path)
    if there.id != manifest.id:
        fields = "; ".join(difference(there.identity, manifest.identity))
        raise BadInput(f"{path} is another store (id {there.id[:8]}, asked for {manifest.id[:8]}): {fields}")


def _write_metadata(path, manifest, dataset):
    """Write all Zarr metadata, and the small arrays: ids, labels, boxes, sizes."""
    root = zarr.create_group(str(path), attributes={"featcache": {"id": manifest.id, "classes": manifest.classes}})
    for split, geometry in manifest.splits.items():
        group = root.create_group(split)
        for name, array in _record_arrays(dataset, split).items():
            # A chunk may not be empty, an array may.
            chunks = tuple(max(size, 1) for size in array.shape)
            group.create_array(name, data=array, chunks=chunks, compressors=[Crc32cCodec()])
        for name, feature in manifest.features.items():
            row = tuple(feature["shape"])
            group.create_array(
                feature_of(name).folder,
                shape=(geometry["rows"], *row),
                shards=(geometry["shard_rows"], *row),
                chunks=(feature["chunk_rows"], *row),
                dtype=feature["dtype"],
                fill_value=float("nan"),
                compressors=[Crc32cCodec()],
            )
    with warnings.catch_warnings():
        # zarr-python warns that consolidated metadata is not in the v3 specification; readers that
        # do not know it ignore it, others open the store without listing folders.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(str(path))


def _record_arrays(dataset, split):
    """The small arrays of a split; docs/store-format.md describes them."""
    records = dataset.splits[split]
    ids = np.array([r.id.encode() for r in records])
    counts = [len(r.boxes) for r in records]
    return {
        "ids": ids.view(np.uint8).reshape(len(records), ids.itemsize),
        "labels": dataset.labels(split),
        "sizes": np.array([(r.height, r.width) for r in records], dtype=np.int32),
        "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes": np.concatenate([r.boxes for r in records]).astype(np.float32),
        "box_classes": np.concatenate([r.box_classes for r in records]).astype(np.int64),
        "box_difficult": np.concatenate([r.box_difficult for r in records]).astype(bool),
    }


def ids_sha256(ids):
    """sha256 (hex) over the ids of a shard's rows, one a line."""
    return hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()


def missing_shards(path, manifest):
    """Return [(split, shard)] that are not committed, in order."""
    return [
        (split, shard)
        for split in manifest.splits
        for shard in range(manifest.shards(split))
        if read_marker(path, manifest, split, shard) is None
    ]


def put_shard(path, manifest, split, shard, ids, features):
    """Write a whole shard, all its features, and commit it.

    ids: of its rows. features: {name: array [rows, ...]}.
    """
    first, end = manifest.rows_of(split, shard)
    files = {}
    for name, rows in features.items():
        if len(rows) != end - first:
            raise ValueError(f"shard {shard} of {split} has {end - first} rows, {name} brings {len(rows)}")
        target = shard_path(path, split, feature_of(name), shard, rows.ndim)
        geometry = manifest.splits[split]["shard_rows"]
        files[name] = write_shard(target, rows, manifest.features[name]["chunk_rows"], geometry)
    commit_shard(path, split, shard, (first, end), ids_sha256(ids), files)


def sweep(path):
    """Remove what a killed writer left behind; call only with the store locked."""
    for leftover in Path(path).rglob(f"*{PARTIAL}"):
        leftover.unlink()


def discard_if_empty(path, manifest):
    """Remove a store in which no shard was ever committed: nothing is lost, and nothing looks whole."""
    if not any(marker_path(path, s, n).exists() for s in manifest.splits for n in range(manifest.shards(s))):
        shutil.rmtree(path)
