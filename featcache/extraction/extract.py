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
from featcache.extraction.growing import Growth, find_store, plan_growth
from featcache.extraction.job import Job, lay_out, measured, plan_job
from featcache.extraction.masks import parse_masks
from featcache.extraction.settings import Settings
from featcache.names import MANIFEST
from featcache.ranks import Alone, join_ranks
from featcache.store.additions import find_additions, merge, read_parts
from featcache.store.folder import Folder
from featcache.store.growing import begin_addition, discard_if_begun, publish, restore, whole_parts
from featcache.store.manifest import Manifest, read_manifest, split_of
from featcache.store.reader import Store
from featcache.store.records import with_axes
from featcache.store.shard import Shard
from featcache.store.writer import check_whole, create_store, discard_if_empty, missing_shards
from featcache.words import written

# Below this cosine a precision's features are no longer those of the network.
TRUSTED_COSINE = 0.99


@takes(
    backbone=CHECKPOINT, dataset=NAME, root=PATH, splits=NAMES, store=PATH, format=NAME, compression=NAME, arch=NAME,
    weights_key=NAME, size=whole(1, MOST_SIDE), resize=NAME, short_side=whole(1, MOST_SIDE), interpolation=NAME, mean=NUMBERS, std=NUMBERS,
    precision=NAME, dtype=NAME, batch_size=whole(1), workers=whole(0, MOST_WORKERS), seed=whole(), views=whole(), crop_scale=NUMBERS,
    decoder=NAME, masks=NAME, limit=whole(1),
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
    masks: str | None = None,
    limit: int | None = None,
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
    masks: such as "rise:2000": write the features of so many masked variants of every image, for attribute, to a store
    of their own; by default their means over positions. Needs `splits`; images are those of them that have a box.
    limit: with masks, how many images of a split.

    A store that was begun is finished; if it is whole, its path is returned at once. What a store of the same backbone,
    data and settings lacks of the features, splits and views is added to it. Under torchrun the processes share the
    work. Raises BadInput for whatever the user can mend.

        path = featcache.extract("ckpt.pth", "voc", root="/data", features="pooled,spatial")
        features = featcache.open_store(path)["train"]["last:pooled"]
    """
    ranks = join_ranks()
    settings = Settings(
        backbone=backbone, arch=arch, weights_key=weights_key, dataset=dataset, root=root, splits=splits, size=size,
        resize=resize, short_side=short_side, interpolation=interpolation, mean=mean, std=std, decoder=decoder, views=views, masks=masks, limit=limit,
        crop_scale=crop_scale, seed=seed, features=features, precision=precision, batch_size=batch_size,
        workers=_default_workers(ranks) if workers is None else workers, device=device, store=store, format=format, compression=compression, dtype=dtype,
    )  # fmt: skip
    job = find_store(_prepare(settings, ranks))
    growth = plan_growth(job)
    if growth.is_finished:
        id = merge(growth.parts).id
        ranks.say(f"store: {job.folder} is finished already (id {id[:8]}: same backbone, data and settings)")
    else:
        id = _write(job, growth, ranks)
        ranks.say(f"store: {job.folder} (id {id[:8]})")
    return str(job.folder)


def _default_workers(ranks: Alone) -> int:
    """Return half of this process's share of the machine's cores, at least 1 and at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // 2 // ranks.local_size))


def _prepare(settings: Settings, ranks: Alone) -> Job:
    """Read the dataset, load the backbone, and work out what the settings amount to. Raises BadInput."""
    device = choose_device(settings.device, ranks.local_rank)
    check_precision(settings.precision, device)
    _check_masks(settings)
    data = read_dataset(settings.dataset, settings.root, settings.splits)
    for line in describe_classes(data):
        ranks.say(line)
    model = _load(settings, data)
    ranks.say(f"backbone: {model.load_report}")
    ranks.say("\n  ".join((f"preprocessing: {model.preprocessing}", *model.preprocessing_report)))
    return plan_job(settings, device, data, model)


def _check_masks(settings: Settings) -> None:
    """Raise BadInput for settings that do not go together with masks, or go with masks alone."""
    if settings.masks is None:
        if settings.limit is not None:
            raise BadInput("--limit is for --masks: a store of images as they are holds whole splits")
        return
    parse_masks(settings.masks)
    if settings.views:
        raise BadInput("--masks and --views: masked variants are of the images as they are; extract each by itself")
    if not settings.splits:
        raise BadInput("--masks takes thousands of passes an image: say of which split with --split, and --limit N")


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


def _write(job: Job, growth: Growth, ranks: Alone) -> str:
    """Write what the store lacks, together with the other processes; return its id.

    job: what was asked for. growth: what that is for the store as it was found. A store that stays empty is removed.
    """
    folder = job.folder
    # Laid out before the folder is locked, which makes it.
    planned = [lay_out(job)] if not growth.parts else growth.additions
    with ranks.leading(folder.locked(f"waiting: another process is extracting into {folder}")) as leads:
        try:
            if leads and MANIFEST in folder.names() and growth.parts != whole_parts(folder):
                # Another process has made it, or added to it, meanwhile.
                growth = plan_growth(job)
                planned = growth.additions
            parts, todo = _begin(growth, planned, ranks) if leads else _join(folder, ranks)
            job = growth.job
            _go_on_as_begun(job, parts, ranks)
            _check_room(job, todo, ranks)
            images = job.images()
            fill(job, todo, images, ranks)
            while leads and (left := ranks.left_behind(lambda: _missing(folder, parts))):
                ranks.say(f"notice: no news of {len(left)} shards that other processes took; doing them here")
                fill(job, left, images, ranks.alone())
            return _finish(job, parts) if leads else ""
        except BaseException:
            if ranks.size == 1:
                discard_if_begun(folder, growth.additions)
                discard_if_empty(folder, (growth.parts or planned)[0])
            raise


def _missing(folder: Folder, parts: Sequence[Manifest]) -> list[Shard]:
    return [shard for part in parts for shard in missing_shards(folder, part)]


def _begin(growth: Growth, planned: Sequence[Manifest], ranks: Alone) -> tuple[list[Manifest], list[Shard]]:
    """Make the store or the additions to it, or restore what is lost of them; hand out and return what is missing.

    planned: the manifest of a new store, or of the additions. Returns (the manifests of all parts, missing shards).
    """
    job, folder = growth.job, growth.job.folder
    arrays = {split: with_axes(own) for split, own in job.all_arrays().items()}
    if not growth.parts:
        if job.settings.precision != "float32" and MANIFEST not in folder.names():
            planned = [measured(job, planned[0])]
        parts = [create_store(folder, planned[0], arrays)]
    else:
        folder.sweep()
        if job.settings.precision != "float32":
            planned = [measured(job, addition) for addition in planned]
        for addition in planned:
            ranks.say(
                f"store: adding {', '.join(addition.features)} of {', '.join(addition.splits)} to {folder}, which keeps "
                "what it has"
            )
        parts = [*growth.parts, *(begin_addition(folder, addition) for addition in planned)]
        restore(folder, growth.parts, arrays)
    todo = _missing(folder, parts)
    ranks.share([(shard.manifest.file_name, shard.split, shard.number) for shard in todo])
    return parts, todo


def _join(folder: Folder, ranks: Alone) -> tuple[list[Manifest], list[Shard]]:
    """Wait until the leading process has made what is written; return the parts that have missing shards, and these."""
    places = ranks.shared()
    parts = {part.file_name: part for part in (read_manifest(folder), *find_additions(folder))}
    todo = [Shard(folder, parts[name], split, number) for name, split, number in places]
    return [part for part in parts.values() if part.file_name in {name for name, _, _ in places}], todo


def _finish(job: Job, parts: Sequence[Manifest]) -> str:
    """Make the additions that are whole now parts of the store, and return its id. Raises BadInput if anything is gone."""
    folder, arrays = job.folder, {split: with_axes(own) for split, own in job.all_arrays().items()}
    for addition in (part for part in parts if part.is_addition and part.after is None):
        known = merge([*whole_parts(folder), addition]).splits
        publish(folder, addition, {split: own for split, own in arrays.items() if split in known})
    store = read_parts(folder)
    if any(part.is_addition for part in parts):
        # A manifest that was lost and is there again has additions behind it.
        others = [split for split in merge(store).splits if split not in arrays]
        restore(folder, store, arrays | {split: with_axes(Store(folder)[split].arrays()) for split in others})
    # The store may have been deleted or moved while it was written.
    check_whole(folder, merge(store))
    return merge(store).id


def _go_on_as_begun(job: Job, parts: Sequence[Manifest], ranks: Alone) -> None:
    """Take over what a begun store fixes because it can change the last bits of a feature. Raises BadInput."""
    if not parts:
        return
    folder, begun = job.folder, parts[0].compute
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
    if any(part.compute.get("folded") for part in parts):
        raise BadInput(
            f"{folder} was begun by an earlier version of featcache, with batch norms folded into the convolutions, which "
            "this one does not do and whose last bits differ: choose another --store"
        )
    for part in (part for part in parts if "cosine" in part.compute):
        ranks.say(
            f"precision: {part.identity['precision']}; on the first image every feature's cosine to float32 is at least "
            f"{part.compute['cosine']:.6f}"
        )
        if part.compute["cosine"] < TRUSTED_COSINE:
            ranks.say(
                f"warning: a cosine below {TRUSTED_COSINE} may cost the probes accuracy; --precision float32 does not"
            )


def _say_masks(job: Job, todo: Sequence[Shard], size: int) -> str:
    """Say how many passes through the backbone, and how many bytes, are still to come."""
    assert job.masking is not None, "there are masks"
    images, each = sum(map(len, todo)), job.masking.number(job.model.preprocessing.size)
    return (
        f"masks: {written(job.masking)}; {images:,} images x {each:,} variants x {size / images / each / 1e3:,.1f} kB: "
        f"{images * each:,} passes through the backbone, {size / 1e6:,.1f} MB to write"
    )


def _check_room(job: Job, todo: Sequence[Shard], ranks: Alone) -> None:
    """Raise BadInput before hours of work that cannot be stored, and say how much of the disk the views take."""
    sizes = [len(shard) * sum(map(shard.manifest.row_bytes, shard.manifest.features)) for shard in todo]
    needed, free = sum(sizes), job.folder.free_bytes()
    if job.masking and todo:
        ranks.say(_say_masks(job, todo, needed))
    views = sum(size for shard, size in zip(todo, sizes, strict=True) if split_of(shard.split) != shard.split)
    if views:
        ranks.say(f"disk: {needed / 1e6:,.0f} MB to write, {views / 1e6:,.0f} of them views")
    if free is not None and job.storage["compression"] is None and needed > free:
        raise BadInput(
            f"{job.folder}: {needed / 1e9:.2f} GB are still to be written, the disk has {free / 1e9:.2f} GB free"
        )
