"""`featcache convert`: the same store in the other format, or compressed, or elsewhere."""

import click
from tqdm import tqdm

from featcache.arguments import NAME, takes
from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.formats import FORMATS, choose_format
from featcache.store.manifest import FILE, stored_as
from featcache.store.marker import digests_of, read_marker
from featcache.store.reader import open_store
from featcache.store.records import with_axes
from featcache.store.sources import open_source
from featcache.store.writer import check_same, check_whole, create_store, missing_shards, put_shard


@takes(format=NAME, compression=NAME)
def convert(store, format=None, out=None, compression=None):
    """Write a finished store in another format, compression or place; return the new store's path.

    store: path or URL. format: zarr or hdf5, by default what the suffix of `out` says. out: path or
    URL, by default that of the store with the format's suffix. compression: None, zstd or blosc.
    Rows are checked against the source's checksums when they are read, and again in the new store
    after they are written. After an interruption the same call goes on. Raises BadInput.
    """
    source = open_store(store)
    if format is None and out is None:
        raise BadInput("say what to convert to: --to, or --out")
    format = choose_format(format, out)
    if out is None:
        if source.folder.remote:
            raise BadInput(f"{store} is a URL: say with --out where the new store shall lie")
        out = source.folder.path.with_suffix(FORMATS[format].SUFFIX)
    target = open_folder(out)
    if str(target) == str(source.folder) or (
        not target.remote and not source.folder.remote and target.path == source.folder.path
    ):
        raise BadInput(f"{out} is the store itself: say with --out where the new one shall lie")
    FORMATS[format].check_place(target, compression)
    manifest = stored_as(source.manifest, format, compression)
    if FILE in target.names():
        check_same(target, manifest.identity, manifest.storage)
    with target.locked(f"waiting: another process is writing {target}"):
        arrays = {split: with_axes(source[split].arrays()) for split in source.manifest.splits}
        manifest = create_store(target, manifest, arrays)
        todo = missing_shards(target, manifest)
        rows = sum(end - first for first, end in (manifest.rows_of(*shard) for shard in todo))
        with tqdm(total=rows, unit="row", desc="convert") as progress:
            for split, shard in todo:
                first, end = manifest.rows_of(split, shard)
                marker = read_marker(source.folder, source.manifest, split, shard)
                features = {
                    name: _rows(source.folder, source.manifest, split, name, shard) for name in manifest.features
                }
                ids = source[split].ids[first:end]
                put_shard(target, manifest, split, shard, ids, features, digests_of(marker))
                for name in manifest.features:
                    _rows(target, manifest, split, name, shard)
                progress.update(end - first)
        check_whole(target, manifest)
    click.echo(f"store: {target} (id {manifest.id[:8]}, all rows checked)", err=True)
    return str(target)


def _rows(folder, manifest, split, name, shard):
    """Read the rows of a shard, as they are stored. Raises BadInput if they do not fit the marker."""
    return open_source(folder, manifest, split, name).take_range(*manifest.rows_of(split, shard))
