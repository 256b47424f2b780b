"""`featcache extract`: from a checkpoint and a dataset to a finished store."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from featcache.backbones.backbone import load_backbone
from featcache.datasets import read_dataset
from featcache.device import choose_device
from featcache.errors import BadInput
from featcache.extraction.images import image_batches
from featcache.feature import parse_features
from featcache.store.manifest import plan, read_manifest
from featcache.store.writer import check_same, create_store, discard_if_empty, locked, missing_shards, put_shard, sweep


def extract(
    backbone,
    dataset,
    root=None,
    splits=None,
    features="pooled,spatial",
    store=None,
    arch=None,
    size=None,
    dtype="float16",
    batch_size=32,
    workers=None,
    device=None,
    seed=0,
):
    """Run a frozen backbone over a dataset and write its features to a store.

    backbone: checkpoint path, or "random" with `arch`. dataset: registered name. splits: names, by
    default all that the protocol needs. features: see featcache.feature. store: path, by default
    features/<dataset>-<arch>-<id>.zarr. size: input side in pixels. dtype: float16 or float32.
    workers: decoding processes. device: torch device, by default cuda if there is one. seed: of the
    random backbone.
    Returns the store's path. Finishes a store that was begun; returns at once if it is whole.
    Raises BadInput for whatever the user can mend.
    """
    device = choose_device(device)
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    model = load_backbone(backbone, arch=arch, size=size, seed=seed)
    click.echo(f"backbone: {model.grounds}", err=True)
    wanted = parse_features(features, model.aliases, model.layers)
    data = read_dataset(dataset, root, splits)
    shapes = _row_shapes(model, wanted)
    manifest = plan(
        identity=_identity(model, data, wanted, dtype),
        rows={split: len(records) for split, records in data.splits.items()},
        shapes=shapes,
        dtype=dtype,
        aliases=model.aliases,
        classes=data.classes,
        task=data.task,
        batch_size=batch_size,
    )
    path = Path(store or Path("features") / f"{data.name}-{model.arch}-{manifest.id[:8]}.zarr")
    if path.exists():
        check_same(path, manifest)
        if not missing_shards(path, read_manifest(path)):
            click.echo(
                f"store: {path} is finished already (id {manifest.id[:8]}: same backbone, data and settings)", err=True
            )
            return path
    create_store(path, manifest, data)
    with locked(path, f"waiting: another process is extracting into {path}"):
        # The store's own geometry counts: it may have been begun with another batch size.
        manifest = read_manifest(path)
        if manifest.batch_size != batch_size:
            click.echo(f"notice: {path} was begun with batch size {manifest.batch_size}; going on with that", err=True)
        sweep(path)
        try:
            _fill(path, manifest, model, data, wanted, workers, device)
        except BaseException:
            discard_if_empty(path, manifest)
            raise
    click.echo(f"store: {path} (id {manifest.id[:8]})", err=True)
    return path


def _identity(model, data, features, dtype):
    return {
        "arch": model.arch,
        "weights_sha256": model.weights_sha256,
        "preprocessing": model.preprocessing.describe(),
        "features": sorted(str(f) for f in features),
        "dtype": dtype,
        "precision": "float32",
        "dataset": {"name": data.name, "splits": {split: data.fingerprint(split) for split in data.splits}},
    }


def _row_shapes(model, features):
    size = model.preprocessing.size
    with torch.inference_mode():
        results = model(torch.zeros(1, 3, size, size), features)
    return {f: tuple(results[str(f)].shape[1:]) for f in features}


def _fill(path, manifest, model, data, features, workers, device):
    """Compute and write the missing shards: workers decode, this thread infers, another writes."""
    todo = missing_shards(path, manifest)
    spans = [manifest.rows_of(split, shard) for split, shard in todo]
    # The last batch of a shard is short rather than reaching into the next one.
    batches = [
        [(split, row) for row in range(start, min(start + manifest.batch_size, end))]
        for (split, _), (first, end) in zip(todo, spans, strict=True)
        for start in range(first, end, manifest.batch_size)
    ]
    model.to(device)
    dtype = np.dtype(next(iter(manifest.features.values()))["dtype"])
    images = image_batches(data, model.preprocessing, batches, workers, pin_memory=device.type == "cuda")
    total = sum(end - first for first, end in spans)
    with ThreadPoolExecutor(1) as writer, tqdm(total=total, unit="img", desc="extract") as progress:
        pending = None
        for (split, shard), (first, end) in zip(todo, spans, strict=True):
            ids = [record.id for record in data.splits[split][first:end]]
            buffers = {str(f): np.empty((end - first, *manifest.features[str(f)]["shape"]), dtype) for f in features}
            row = 0
            while row < end - first:
                batch = next(images)
                results = _infer(model, batch.to(device, non_blocking=True), features)
                for name, values in results.items():
                    buffers[name][row : row + len(batch)] = _cast(values, dtype, name, first + row, ids[row:])
                row += len(batch)
                progress.update(len(batch))
            if pending:
                pending.result()
            pending = writer.submit(put_shard, path, manifest, split, shard, ids, buffers)
        if pending:
            pending.result()


def _infer(model, images, features):
    with torch.inference_mode():
        return {name: values.cpu() for name, values in model(model.preprocessing.normalise(images), features).items()}


def _cast(values, dtype, name, first_row, ids):
    """Cast float32 [B, ...] to the store's dtype. Raises BadInput for what the dtype cannot hold."""
    with np.errstate(over="ignore"):
        cast = values.numpy().astype(dtype)
    flat = cast.reshape(len(cast), -1)
    bad = ~np.isfinite(flat).all(axis=1)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        peak = float(values[at].abs().max())
        where = f"feature {name}, row {first_row + at} (id {ids[at]})"
        if np.isfinite(peak):
            raise BadInput(f"{where}: value {peak:.4g} is beyond {dtype}; extract with --dtype float32")
        raise BadInput(f"{where}: the backbone yields a value that is not finite")
    # A map of values below float16's smallest normal number loses its digits without a word.
    peak = float(values.abs().max())
    if 0 < peak < np.finfo(dtype).tiny:
        raise BadInput(
            f"feature {name}, rows from {first_row} (id {ids[0]}): no value exceeds {peak:.2g}, too small for {dtype}; "
            "extract with --dtype float32"
        )
    return cast
