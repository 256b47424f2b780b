"""`featcache extract`: from a checkpoint and a dataset to a finished store."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from featcache.arguments import CHECKPOINT, MOST_SIDE, MOST_WORKERS, NAME, NAMES, NUMBERS, PATH, takes, whole
from featcache.backbones.load import load_backbone
from featcache.backbones.precision import check_precision, fold_batch_norm, layers_of, measure, running
from featcache.backbones.preprocessing import OWN
from featcache.datasets import read_dataset
from featcache.datasets.class_counts import describe_classes
from featcache.device import choose_device
from featcache.errors import BadInput, nearest
from featcache.extraction.images import DECODERS, Images, check_decoder, image_batches
from featcache.extraction.views import plan_views
from featcache.feature import parse_features
from featcache.ranks import join_ranks
from featcache.store.dtype import STORED
from featcache.store.folder import open_folder
from featcache.store.formats import FORMATS, choose_format
from featcache.store.manifest import FILE, feature_of, identity_hash, plan, read_manifest, split_of
from featcache.store.reader import Store
from featcache.store.records import changes, record_arrays, with_axes
from featcache.store.writer import (
    check_same,
    check_shards,
    check_whole,
    create_store,
    discard_if_empty,
    missing_files,
    missing_shards,
    put_shard,
)

# Below this the features of a precision are not those of the network any more.
TRUSTED_COSINE = 0.99


@takes(
    backbone=CHECKPOINT, dataset=NAME, root=PATH, splits=NAMES, store=PATH, format=NAME, compression=NAME, arch=NAME,
    weights_key=NAME, size=whole(1, MOST_SIDE), resize=NAME, short_side=whole(1, MOST_SIDE), interpolation=NAME, mean=NUMBERS, std=NUMBERS,
    precision=NAME, dtype=NAME, batch_size=whole(1), workers=whole(0, MOST_WORKERS), seed=whole(), views=whole(), crop_scale=NUMBERS,
    decoder=NAME,
)  # fmt: skip
def extract(
    backbone,
    dataset,
    root=None,
    splits=None,
    features=None,
    store=None,
    format=None,
    compression=None,
    arch=None,
    weights_key=None,
    size=None,
    resize=None,
    short_side=None,
    interpolation=None,
    mean=None,
    std=None,
    precision="float32",
    dtype="float16",
    batch_size=32,
    workers=None,
    device=None,
    seed=0,
    views=0,
    crop_scale=None,
    decoder="exact",
):
    """Run a frozen backbone over a dataset and write its features to a store.

    backbone: checkpoint path, or "random" with `arch`. weights_key: which of several encoders in it.
    dataset: registered name. splits: names, by default all that the protocol needs. features: see
    featcache.feature; by default pooled and spatial of the last layer, and cls if it has a class token.
    store: path or URL, by default features/<dataset>-<arch>-<id>.zarr. format: zarr or hdf5, by default
    what the store's suffix says. compression: None, zstd or blosc. size, resize, short_side, interpolation, mean, std: see
    Preprocessing; size and resize by default as the dataset's protocol says, the others as the backbone
    does. precision: float32, tf32, bf16 or fp16, of the network; dtype: float16, float32 or bfloat16, of
    the store. workers: decoding processes. device: torch device, by default cuda if there is one. seed:
    of the random backbone, and of the views. views: how many augmented views of every training image to
    make too. crop_scale: (lowest, highest) share of the image in their crops, by default that of the
    dataset's protocol. decoder: exact, or draft, which is quicker on large JPEGs.
    Returns the store's path. Finishes a store that was begun; returns at once if it is whole. Under
    torchrun the processes share the work. Raises BadInput for whatever the user can mend.
    """
    ranks = join_ranks()
    say = click.echo if ranks.rank == 0 else (lambda *_, **__: None)
    device = choose_device(device, ranks.local_rank)
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2 // ranks.local_size))
    check_precision(precision, device)
    data = read_dataset(dataset, root, splits)
    for line in describe_classes(data):
        say(line, err=True)
    model = load_backbone(
        backbone,
        arch=arch,
        seed=seed,
        weights_key=weights_key,
        size=data.size if size is None else size,
        # "crop" is the protocol of whole images, which leaves it to the weights to squash instead.
        resize=(OWN if data.resize == "crop" else data.resize) if resize is None else resize,
        short_side=short_side,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )
    say(f"backbone: {model.grounds}", err=True)
    say("\n  ".join((f"preprocessing: {model.preprocessing}", *model.preprocessing_grounds)), err=True)
    check_decoder(decoder, model.preprocessing)
    if isinstance(features, str | list | tuple | None) and not features:
        features = "pooled,spatial,cls" if model.class_token else "pooled,spatial"
    wanted = parse_features(features, model.aliases, model.layers)
    views = plan_views(data, views, seed, crop_scale)
    format = choose_format(format, store)
    identity = _identity(model, data, wanted, dtype, precision, decoder) | views.describe()
    id, storage = identity_hash(identity), {"format": format, "compression": compression}
    default = Path("features") / f"{data.name}-{model.arch.replace(':', '-')}-{id[:8]}{FORMATS[format].SUFFIX}"
    folder = open_folder(store or default)
    FORMATS[format].check_place(folder, compression)
    arrays = {split: record_arrays(data, split) for split in data.splits}
    if FILE in folder.names():
        begun = _begun(folder, identity, storage, arrays)
        if not missing_shards(folder, begun) and not missing_files(folder, begun):
            check_shards(folder, begun)
            say(f"store: {folder} is finished already (id {id[:8]}: same backbone, data and settings)", err=True)
            return str(folder)
    manifest = plan(
        identity=identity,
        rows={split: len(records) for split, records in data.splits.items()}
        | {group: len(data.splits[split]) for group, (split, _) in views.groups().items()},
        shapes=_row_shapes(model, wanted),
        dtype=dtype,
        aliases=model.aliases,
        classes=data.classes,
        task=data.task,
        compute={
            "device": device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "batch_size": batch_size,
        },
        storage=storage,
    )
    with ranks.leading(folder.locked(f"waiting: another process is extracting into {folder}")) as leads:
        try:
            if leads:
                if precision != "float32" and FILE not in folder.names():
                    plain = Images(data, model.preprocessing, DECODERS[decoder])
                    manifest = _measured(manifest, model, plain, wanted, device)
                arrays = {group: with_axes(a) for group, a in views.arrays(arrays).items()}
                manifest = create_store(folder, manifest, arrays)
                todo = ranks.share(missing_shards(folder, manifest))
            else:
                todo = ranks.shared()
                manifest = read_manifest(folder)
            _go_on_as_begun(folder, manifest, model, device, batch_size, say)
            _check_room(folder, manifest, todo, say)
            crops = {group: Store(folder)[group].augmentation for group in views.groups()}
            images = Images(data, model.preprocessing, DECODERS[decoder], crops)
            _fill(folder, manifest, model, images, wanted, ranks, todo, workers, device)
            while leads and (left := ranks.left_behind(lambda: missing_shards(folder, manifest))):
                say(f"notice: no news of {len(left)} shards that other processes took; doing them here", err=True)
                _fill(folder, manifest, model, images, wanted, ranks.alone(), left, workers, device)
            if leads:
                # Something may have deleted or moved the store while it was written.
                check_whole(folder, manifest)
        except BaseException:
            if ranks.size == 1:
                discard_if_empty(folder, manifest)
            raise
    say(f"store: {folder} (id {id[:8]})", err=True)
    return str(folder)


def _begun(folder, identity, storage, arrays):
    """The manifest of the store that is there. Raises BadInput if it is another one; of a dataset, says which images."""
    try:
        return check_same(folder, identity, storage)
    except BadInput as error:
        there = Store(folder)
        said = []
        for split in there.splits:
            pair = [i["dataset"]["splits"].get(split) for i in (there.manifest.identity, identity)]
            if split in arrays and pair[0] != pair[1]:
                said.append(f"{split}: {changes(there[split].arrays(), arrays[split])}")
        raise BadInput("; ".join([error.message, *said])) from None


def _go_on_as_begun(folder, manifest, model, device, batch_size, say):
    """Take over what a begun store fixes, since it can change the last bits of a feature."""
    begun = manifest.compute
    if begun["device"] != device.type:
        raise BadInput(
            f"{folder} was begun on {begun['device']}; features made on {device.type} differ in their last bits: "
            f"go on with --device {begun['device']}, or choose another --store"
        )
    if begun["batch_size"] != batch_size:
        say(f"notice: {folder} was begun with batch size {begun['batch_size']}; going on with that", err=True)
    if begun["threads"] and begun["threads"] != torch.get_num_threads():
        say(f"notice: {folder} was begun with {begun['threads']} threads a process; going on with that", err=True)
        torch.set_num_threads(begun["threads"])
    if begun.get("folded"):
        model.trunk = fold_batch_norm(model.trunk, layers_of(map(feature_of, manifest.features)))
    if "cosine" in begun:
        folded = "folded" if begun["folded"] else "not folded"
        say(
            f"precision: {manifest.identity['precision']}, batch norms {folded}; on the first image every feature's "
            f"cosine to float32 is at least {begun['cosine']:.6f}",
            err=True,
        )
        if begun["cosine"] < TRUSTED_COSINE:
            say(
                f"warning: a cosine below {TRUSTED_COSINE} may cost the probes accuracy; --precision float32 does not",
                err=True,
            )


def _check_room(folder, manifest, todo, say):
    """Raise BadInput before hours of work that cannot be stored; say what views cost."""
    row_bytes = sum(manifest.row_bytes(f) for f in manifest.features)
    sizes = {shard: row_bytes * (rows[1] - rows[0]) for shard in todo for rows in [manifest.rows_of(*shard)]}
    needed, free = sum(sizes.values()), folder.free_bytes()
    views = sum(size for (group, _), size in sizes.items() if split_of(group) != group)
    if views:
        say(f"disk: {needed / 1e6:,.0f} MB to write, {views / 1e6:,.0f} of them views", err=True)
    if free is not None and manifest.storage["compression"] is None and needed > free:
        raise BadInput(
            f"{folder}: {needed / 1e9:.2f} GB are still to be written, the disk has {free / 1e9:.2f} GB free"
        )


def _identity(model, data, features, dtype, precision, decoder):
    if dtype not in STORED:
        raise BadInput(f"unknown dtype {dtype!r}{nearest(dtype, STORED)} (known: {', '.join(STORED)})")
    return {
        "arch": model.arch,
        "weights_sha256": model.weights_sha256,
        "preprocessing": model.preprocessing.describe(),
        "features": sorted(str(f) for f in features),
        "dtype": dtype,
        "precision": precision,
        "dataset": {"name": data.name, "splits": {split: data.fingerprint(split) for split in data.splits}},
        # The usual one is not named, so that stores from before there was a choice keep their ids.
        **({"decoder": DECODERS[decoder]} if decoder != "exact" else {}),
    }


def _measured(manifest, model, images, features, device):
    """The manifest with what its precision does to the first image, see featcache.backbones.precision.measure.

    One image: float32 twice and once the precision cost as much as six or seven images of the extraction.
    """
    ((image, _),) = image_batches(images, [[(next(iter(images.splits)), 0)]], workers=0)
    image = model.to(device).preprocessing.normalise(image.to(device))
    found = measure(model, image, features, manifest.identity["precision"])
    return replace(manifest, compute=manifest.compute | found)


def _row_shapes(model, features):
    size = model.preprocessing.size
    with torch.inference_mode():
        images = model.preprocessing.normalise(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        results = model(images, features)
    return {f: tuple(results[str(f)].shape[1:]) for f in features}


def _fill(folder, manifest, model, images, features, ranks, todo, workers, device):
    """Compute and write shards as they are drawn: workers decode, this thread infers, another writes."""
    drawn = deque()

    def batches():
        for split, shard in ranks.draw(todo):
            drawn.append((split, shard))
            first, end = manifest.rows_of(split, shard)
            # The last batch of a shard is short rather than reaching into the next one.
            for start in range(first, end, manifest.compute["batch_size"]):
                stop = min(start + manifest.compute["batch_size"], end)
                yield [(split, row) for row in range(start, stop)]

    model.to(device)
    dtype = getattr(torch, next(iter(manifest.features.values()))["dtype"])
    total = sum(end - first for first, end in (manifest.rows_of(*shard) for shard in todo))
    progress = tqdm(total=total, unit="img", desc="extract", disable=ranks.rank != 0)
    side = model.preprocessing.size
    memory = torch.empty(manifest.compute["batch_size"], side, side, 3, device=device)
    pending, row = None, 0
    with ThreadPoolExecutor(1) as writer, progress:
        for batch, digests in image_batches(images, batches(), workers, pin_memory=device.type == "cuda"):
            if row == 0:
                split, shard = drawn.popleft()
                first, end = manifest.rows_of(split, shard)
                ids = [record.id for record in images.records(split, first, end)]
                seen = []
                buffers = {
                    str(f): torch.empty((end - first, *manifest.features[str(f)]["shape"]), dtype=dtype)
                    for f in features
                }
            with running(manifest.identity["precision"], device):
                pixels = model.preprocessing.normalise(batch.to(device, non_blocking=True), memory)
                results = model(pixels, features)
                for name, values in results.items():
                    buffers[name][row : row + len(batch)] = _cast(
                        values, dtype, name, first + row, ids[row:], manifest.identity["precision"]
                    )
            seen.append(digests)
            row += len(batch)
            progress.update(ranks.count(len(batch)) - progress.n)
            if row == end - first:
                if pending:
                    pending.result()
                stored = {name: _as_stored(rows) for name, rows in buffers.items()}
                shown = np.concatenate(seen)
                pending, row = writer.submit(put_shard, folder, manifest, split, shard, ids, stored, shown), 0
        if pending:
            pending.result()


def _as_stored(rows):
    """numpy view of a tensor; bfloat16, which numpy lacks, as uint16."""
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _cast(values, dtype, name, first_row, ids, precision="float32"):
    """Cast float32 [B, ...] to the store's dtype, on the CPU. Raises BadInput for what the dtype cannot hold.

    precision: what the network ran in, which an overflow may be due to.
    """
    cast = values.to(dtype)
    fine = torch.isfinite(cast).flatten(1).all(1)
    kind = str(dtype).removeprefix("torch.")
    if not fine.all():
        at = int((~fine).nonzero()[0])
        peak = float(values[at].abs().max())
        where = f"feature {name}, row {first_row + at} (id {ids[at]})"
        if peak < float("inf"):
            raise BadInput(f"{where}: value {peak:.4g} is beyond {kind}; extract with --dtype float32")
        lesser = "" if precision == "float32" else f" in {precision}; extract with --precision float32"
        raise BadInput(f"{where}: the backbone yields a value that is not finite{lesser}")
    # A map of values below float16's smallest normal number loses its digits without a word.
    peak = float(values.abs().max())
    if 0 < peak < torch.finfo(dtype).tiny:
        raise BadInput(
            f"feature {name}, rows from {first_row} (id {ids[0]}): no value exceeds {peak:.2g}, too small for {kind}; "
            "extract with --dtype float32"
        )
    return cast.cpu()
