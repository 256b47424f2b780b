"""`featcache extract`: from a checkpoint and a dataset to a finished store."""

import os
from collections.abc import Sequence

import torch

from featcache.arguments import CHECKPOINT, MOST_SIDE, MOST_WORKERS, NAME, NAMES, NUMBERS, PATH, takes, whole
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import OWN
from featcache.backbones.load import load_backbone
from featcache.backbones.precision import check_precision
from featcache.datasets import read_dataset
from featcache.datasets.class_counts import describe_classes
from featcache.datasets.record import Dataset
from featcache.device import choose_device
from featcache.errors import BadInput
from featcache.extraction.fill import fill
from featcache.extraction.job import Job, lay_out, measured, plan_job
from featcache.extraction.settings import Settings
from featcache.names import MANIFEST
from featcache.ranks import Alone, join_ranks
from featcache.store.manifest import Manifest, read_manifest, split_of
from featcache.store.reader import Store
from featcache.store.records import changes, with_axes
from featcache.store.shard import Shard
from featcache.store.writer import (
    check_same,
    check_shards,
    check_whole,
    create_store,
    discard_if_empty,
    missing_files,
    missing_shards,
)

# Below this cosine a precision's features are no longer those of the network.
TRUSTED_COSINE = 0.99


@takes(
    backbone=CHECKPOINT, dataset=NAME, root=PATH, splits=NAMES, store=PATH, format=NAME, compression=NAME, arch=NAME,
    weights_key=NAME, size=whole(1, MOST_SIDE), resize=NAME, short_side=whole(1, MOST_SIDE), interpolation=NAME, mean=NUMBERS, std=NUMBERS,
    precision=NAME, dtype=NAME, batch_size=whole(1), workers=whole(0, MOST_WORKERS), seed=whole(), views=whole(), crop_scale=NUMBERS,
    decoder=NAME,
)  # fmt: skip
def extract(
    backbone: str | os.PathLike[str],
    dataset: str,
    root: str | os.PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
    features: str | Sequence[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    format: str | None = None,
    compression: str | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    size: int | None = None,
    resize: str | None = None,
    short_side: int | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    precision: str = "float32",
    dtype: str = "float16",
    batch_size: int = 32,
    workers: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    views: int = 0,
    crop_scale: Sequence[float] | None = None,
    decoder: str = "exact",
) -> str:
    """Run a frozen backbone over a dataset and write its features to a store; return the store's path.

    backbone: checkpoint path, or "random" with `arch`. weights_key: which of several encoders in the checkpoint.
    dataset: registered name. splits: names, by default all that the protocol needs. features: names, see
    featcache.feature; by default pooled and spatial of the last layer, and cls if it has a class token.
    store: path or URL, by default features/<dataset>-<arch>-<id>.zarr. format: zarr or hdf5, by default
    what the store's suffix says. compression: None, zstd or blosc.
    size, resize, short_side, interpolation, mean, std: fields of Preprocessing. By default the dataset's protocol says
    size and resize, and the backbone the others.
    precision: float32, tf32, bf16 or fp16, of the network. dtype: float16, float32 or bfloat16, of the store.
    workers: number of processes that decode images. device: torch device, by default cuda if there is one.
    seed: of the random backbone, and of the views. views: how many augmented views of every training image to add.
    crop_scale: (lowest, highest) share of the image in their crops, by default that of the dataset's protocol.
    decoder: exact, or draft, which is quicker on large JPEGs and not exact.

    A store that was begun is finished; if it is whole, its path is returned at once. Under torchrun the processes share
    the work. Raises BadInput for whatever the user can mend.

        path = featcache.extract("ckpt.pth", "voc", root="/data", features="pooled,spatial")
        features = featcache.open_store(path)["train"]["last:pooled"]
    """
    ranks = join_ranks()
    settings = Settings(
        backbone=backbone, arch=arch, weights_key=weights_key, dataset=dataset, root=root, splits=splits, size=size,
        resize=resize, short_side=short_side, interpolation=interpolation, mean=mean, std=std, decoder=decoder, views=views,
        crop_scale=crop_scale, seed=seed, features=features, precision=precision, batch_size=batch_size,
        workers=_default_workers(ranks) if workers is None else workers, device=device, store=store, format=format, compression=compression, dtype=dtype,
    )  # fmt: skip
    job = _prepare(settings, ranks)
    if _is_finished(job):
        ranks.say(f"store: {job.folder} is finished already (id {job.id[:8]}: same backbone, data and settings)")
    else:
        _write(job, ranks)
        ranks.say(f"store: {job.folder} (id {job.id[:8]})")
    return str(job.folder)


def _default_workers(ranks: Alone) -> int:
    """Return half of this process's share of the machine's cores, at least 1 and at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // 2 // ranks.local_size))


def _prepare(settings: Settings, ranks: Alone) -> Job:
    """Read the dataset, load the backbone, and work out what the settings amount to. Raises BadInput."""
    device = choose_device(settings.device, ranks.local_rank)
    check_precision(settings.precision, device)
    data = read_dataset(settings.dataset, settings.root, settings.splits)
    for line in describe_classes(data):
        ranks.say(line)
    model = _load(settings, data)
    ranks.say(f"backbone: {model.load_report}")
    ranks.say("\n  ".join((f"preprocessing: {model.preprocessing}", *model.preprocessing_report)))
    return plan_job(settings, device, data, model)


def _load(settings: Settings, data: Dataset) -> Backbone:
    """Load the backbone, with the preprocessing that the settings or else the dataset ask for. Raises BadInput."""
    # "crop" is the protocol of whole images, which leaves it to the weights to squash instead.
    rule = OWN if data.resize == "crop" else data.resize
    return load_backbone(
        settings.backbone,
        arch=settings.arch,
        seed=settings.seed,
        weights_key=settings.weights_key,
        size=data.size if settings.size is None else settings.size,
        resize=rule if settings.resize is None else settings.resize,
        short_side=settings.short_side,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
    )


def _is_finished(job: Job) -> bool:
    """Return whether the store is whole already. Raises BadInput if another store is in its place, or it is damaged."""
    if MANIFEST not in job.folder.names():
        return False
    manifest = _begun(job)
    if missing_shards(job.folder, manifest) or missing_files(job.folder, manifest):
        return False
    check_shards(job.folder, manifest)
    return True


def _begun(job: Job) -> Manifest:
    """Return the manifest of the begun store. Raises BadInput if it is another one, and says which images differ."""
    try:
        return check_same(job.folder, job.identity, job.storage)
    except BadInput as error:
        begun, lines = Store(job.folder), [error.message]
        for split in begun.splits:
            pair = [i["dataset"]["splits"].get(split) for i in (begun.manifest.identity, job.identity)]
            if split in job.arrays and pair[0] != pair[1]:
                lines.append(f"{split}: {changes(begun[split].arrays(), job.arrays[split])}")
        raise BadInput("; ".join(lines)) from None


def _write(job: Job, ranks: Alone) -> None:
    """Write what the store lacks, together with the other processes. A store that stays empty is removed."""
    folder, planned = job.folder, lay_out(job)
    with ranks.leading(folder.locked(f"waiting: another process is extracting into {folder}")) as leads:
        try:
            manifest, todo = _begin(job, planned, ranks) if leads else _join(job, ranks)
            _go_on_as_begun(job, manifest, ranks)
            _check_room(job, manifest, todo, ranks)
            images = job.images()
            fill(job, manifest, todo, images, ranks)
            while leads and (left := ranks.left_behind(lambda: missing_shards(folder, manifest))):
                ranks.say(f"notice: no news of {len(left)} shards that other processes took; doing them here")
                fill(job, manifest, left, images, ranks.alone())
            if leads:
                # The store may have been deleted or moved while it was written.
                check_whole(folder, manifest)
        except BaseException:
            if ranks.size == 1:
                discard_if_empty(folder, planned)
            raise


def _begin(job: Job, planned: Manifest, ranks: Alone) -> tuple[Manifest, list[Shard]]:
    """Make the store, or restore what a begun one lacks; hand out and return its manifest and its missing shards."""
    if job.settings.precision != "float32" and MANIFEST not in job.folder.names():
        planned = measured(job, planned)
    arrays = {split: with_axes(a) for split, a in job.views.arrays(job.arrays).items()}
    manifest = create_store(job.folder, planned, arrays)
    todo = missing_shards(job.folder, manifest)
    ranks.share([(shard.split, shard.number) for shard in todo])
    return manifest, todo


def _join(job: Job, ranks: Alone) -> tuple[Manifest, list[Shard]]:
    """Wait until the leading process has made the store; return its manifest and its missing shards."""
    places = ranks.shared()
    manifest = read_manifest(job.folder)
    return manifest, [Shard(job.folder, manifest, split, number) for split, number in places]


def _go_on_as_begun(job: Job, manifest: Manifest, ranks: Alone) -> None:
    """Take over what a begun store fixes because it can change the last bits of a feature. Raises BadInput."""
    folder, begun = job.folder, manifest.compute
    if begun["device"] != job.device.type:
        raise BadInput(
            f"{folder} was begun on {begun['device']}; features made on {job.device.type} differ in their last bits: "
            f"go on with --device {begun['device']}, or choose another --store"
        )
    if begun["batch_size"] != job.settings.batch_size:
        ranks.say(f"notice: {folder} was begun with batch size {begun['batch_size']}; going on with that")
    if begun["threads"] and begun["threads"] != torch.get_num_threads():
        ranks.say(f"notice: {folder} was begun with {begun['threads']} threads a process; going on with that")
        torch.set_num_threads(begun["threads"])
    if begun.get("folded"):
        raise BadInput(
            f"{folder} was begun by an earlier version of featcache, with batch norms folded into the convolutions, which "
            "this one does not do and whose last bits differ: choose another --store"
        )
    if "cosine" in begun:
        ranks.say(
            f"precision: {manifest.identity['precision']}; on the first image every feature's cosine to float32 is at least "
            f"{begun['cosine']:.6f}"
        )
        if begun["cosine"] < TRUSTED_COSINE:
            ranks.say(
                f"warning: a cosine below {TRUSTED_COSINE} may cost the probes accuracy; --precision float32 does not"
            )


def _check_room(job: Job, manifest: Manifest, todo: Sequence[Shard], ranks: Alone) -> None:
    """Raise BadInput before hours of work that cannot be stored, and say how much of the disk the views take."""
    row_bytes = sum(manifest.row_bytes(feature) for feature in manifest.features)
    needed, free = row_bytes * sum(map(len, todo)), job.folder.free_bytes()
    views = row_bytes * sum(len(shard) for shard in todo if split_of(shard.split) != shard.split)
    if views:
        ranks.say(f"disk: {needed / 1e6:,.0f} MB to write, {views / 1e6:,.0f} of them views")
    if free is not None and job.storage["compression"] is None and needed > free:
        raise BadInput(
            f"{job.folder}: {needed / 1e9:.2f} GB are still to be written, the disk has {free / 1e9:.2f} GB free"
        )
