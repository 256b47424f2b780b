"""`featcache convert`: the same store in the other format, or compressed, or elsewhere."""

import os

import numpy as np

from featcache.arguments import NAME, takes
from featcache.errors import BadInput
from featcache.names import MANIFEST
from featcache.progress import Progress, say
from featcache.store.additions import part_of
from featcache.store.folder import Folder, open_folder
from featcache.store.formats import FORMATS, choose_format
from featcache.store.manifest import Manifest, feature_of, plan, stored_as
from featcache.store.reader import Store, open_store
from featcache.store.records import with_axes
from featcache.store.shard import Shard
from featcache.store.sources import open_source
from featcache.store.writer import check_same, check_whole, create_store, missing_shards, put_shard


@takes(format=NAME, compression=NAME)
def convert(
    store: str | os.PathLike[str],
    format: str | None = None,
    out: str | os.PathLike[str] | None = None,
    compression: str | None = None,
) -> str:
    """Write a finished store in another format, compression or place; return the new store's path.

    store: path or URL. format: zarr or hdf5, by default what the suffix of `out` says. out: path or URL, by default
    that of the store with the format's suffix. compression: None, zstd or blosc.
    Rows are checked against the source's checksums when they are read, and again in the new store after they are
    written. After an interruption the same call goes on. Raises BadInput.

        featcache.convert("voc.zarr", "hdf5")  # "voc.hdf5"
        featcache.convert("voc.zarr", out="s3://bucket/voc.zarr", compression="zstd")
    """
    source = open_store(store)
    if format is None and out is None:
        raise BadInput("say what to convert to: --to, or --out")
    format = choose_format(format, out)
    target = _target(source, store, format, out)
    FORMATS[format].check_place(target, compression)
    manifest = stored_as(_at_once(source), format, compression)
    if MANIFEST in target.names():
        check_same(target, manifest.identity, manifest.storage)
    with target.locked(f"waiting: another process is writing {target}"):
        arrays = {split: with_axes(source[split].arrays()) for split in source.manifest.splits}
        manifest = create_store(target, manifest, arrays)
        todo = missing_shards(target, manifest)
        with Progress("convert", sum(map(len, todo)), unit="row") as progress:
            for shard in todo:
                _copy(source, shard)
                progress.update(len(shard))
        check_whole(target, manifest)
    say(f"store: {target} (id {manifest.id[:8]}, all rows checked)")
    return str(target)


def _target(source: Store, store: str | os.PathLike[str], format: str, out: str | os.PathLike[str] | None) -> Folder:
    """Return the folder that the new store is written to. store, format, out: as in `convert`. Raises BadInput."""
    if out is None:
        if source.folder.remote:
            raise BadInput(f"{store} is a URL: say with --out where the new store shall lie")
        out = source.folder.path.with_suffix(FORMATS[format].SUFFIX)
    target = open_folder(out)
    if str(target) == str(source.folder) or (
        not target.remote and not source.folder.remote and target.path == source.folder.path
    ):
        raise BadInput(f"{out} is the store itself: say with --out where the new one shall lie")
    return target


def _at_once(source: Store) -> Manifest:
    """Return the manifest of a store; of one that has grown, that of the same store extracted at once."""
    manifest = source.manifest
    if len(source.parts) == 1:
        return manifest
    (dtype,) = {spec["dtype"] for spec in manifest.features.values()}
    return plan(
        identity=manifest.identity,
        rows={split: geometry["rows"] for split, geometry in manifest.splits.items()},
        shapes={feature_of(name): tuple(spec["shape"]) for name, spec in manifest.features.items()},
        dtype=dtype,
        aliases=manifest.aliases,
        classes=manifest.classes,
        task=manifest.task,
        compute=manifest.compute,
        storage=manifest.storage,
    )


def _copy(source: Store, shard: Shard) -> None:
    """Copy a shard of the new store from the old one. Raises BadInput if the rows of either do not fit its marker."""
    first, end = shard.rows
    features = {
        name: _rows(source.folder, part_of(source.parts, shard.split, name), shard, name)
        for name in shard.manifest.features
    }
    put_shard(shard, source[shard.split].ids[first:end], features, source[shard.split].digests_of_rows(first, end))
    for name in shard.manifest.features:
        _rows(shard.folder, shard.manifest, shard, name)


def _rows(folder: Folder, manifest: Manifest, shard: Shard, feature: str) -> np.ndarray:
    """Read the rows of a shard from a store, as they are stored. Raises BadInput if they do not fit its markers."""
    return open_source(folder, manifest, shard.split, feature).take_range(*shard.rows)
