"""`featcache extract`: from checkpoints and a dataset to finished stores."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from featcache.arguments import (
    BACKBONE,
    CHECKPOINTS,
    MOST_SIDE,
    MOST_WORKERS,
    NAME,
    NAMES,
    NUMBERS,
    PATH,
    takes,
    whole,
)
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import OWN
from featcache.backbones.load import load_backbone
from featcache.backbones.precision import check_precision
from featcache.datasets import read_dataset
from featcache.datasets.class_counts import describe_classes
from featcache.datasets.record import Dataset
from featcache.device import choose_device, free_bytes
from featcache.errors import BadInput
from featcache.extraction.checkpoint_files import checkpoint_files, stems
from featcache.extraction.growing import Growth, find_store, plan_growth
from featcache.extraction.job import Job, plan_job
from featcache.extraction.masks import parse_masks
from featcache.extraction.settings import Settings
from featcache.extraction.write import write
from featcache.ranks import Alone, join_ranks
from featcache.store.additions import merge
from featcache.store.manifest import SHARD_BYTES

# What the arguments of extract must be, besides the backbone.
EXPECTED = {
    "dataset": NAME, "root": PATH, "splits": NAMES, "store": PATH, "format": NAME, "compression": NAME, "arch": NAME,
    "weights_key": NAME, "size": whole(1, MOST_SIDE), "resize": NAME, "short_side": whole(1, MOST_SIDE),
    "interpolation": NAME, "mean": NUMBERS, "std": NUMBERS, "precision": NAME, "dtype": NAME, "batch_size": whole(1),
    "workers": whole(0, MOST_WORKERS), "seed": whole(), "views": whole(), "crop_scale": NUMBERS, "decoder": NAME,
    "masks": NAME, "limit": whole(1),
}  # fmt: skip
# What is held of each checkpoint in a pass, besides its network: shards that are filled, and those that are written.
HELD = 2 * SHARD_BYTES


@takes(backbone=BACKBONE, **EXPECTED)
def extract(
    backbone: str | os.PathLike[str] | torch.nn.Module,
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

    backbone: checkpoint path, "random" with `arch`, or a module in memory that takes images [B, 3, H, W]; size, mean and
    std say what it was trained with. weights_key: which of several encoders in the checkpoint.
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
        path = featcache.extract(my_network, "voc", root="/data", size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    """
    ranks = join_ranks()
    settings = Settings(
        backbone=backbone, arch=arch, weights_key=weights_key, dataset=dataset, root=root, splits=splits, size=size,
        resize=resize, short_side=short_side, interpolation=interpolation, mean=mean, std=std, decoder=decoder,
        views=views, masks=masks, limit=limit, crop_scale=crop_scale, seed=seed, features=features, precision=precision,
        batch_size=batch_size, workers=_workers(workers, ranks), device=device, store=store, format=format, compression=compression,
        dtype=dtype,
    )  # fmt: skip
    return _extract_together([settings], _read(settings, ranks), ranks, {})[0]


@takes(backbones=CHECKPOINTS, **EXPECTED)
def extract_many(
    backbones: Sequence[str | os.PathLike[str]], dataset: str, store: str | os.PathLike[str] | None = None, **more: Any
) -> list[str]:
    """Run several backbones over a dataset, decoding each image once for all that see it alike; return stores' paths.

    backbones: checkpoint paths, patterns such as "ckpts/*.pth", or text files (.txt) with a path on each line. store: the
    folder in which all stores lie, by default features; each is named after dataset, architecture, checkpoint and id.
    more: arguments of extract, the same for all. Checkpoints with the same weights share a store. As many backbones are
    held at a time as fit into half of the memory. Raises BadInput.

        paths = featcache.extract_many(["runs/epoch_*.pth"], "voc", root="/data", features="pooled")
    """
    ranks = join_ranks()
    settings = _settings(dataset, more, ranks)
    groups = _held_together(settings, backbones, store, ranks)
    data, paths, seen = _read(settings, ranks), list[str](), dict[str, str]()
    for each in groups:
        paths += _extract_together(each, data, ranks, seen)
    return paths


def growths_of(
    backbone: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dataset: str,
    store: str | os.PathLike[str] | None = None,
    **more: Any,
) -> Iterator[list[Growth]]:
    """Yield what extract, or extract_many for a list of backbones, would do to the stores of those held at a time.

    Takes their arguments. Nothing is written. Raises BadInput.
    """
    alone = Alone()
    settings = _settings(dataset, more, alone)
    if isinstance(backbone, list | tuple):
        groups = _held_together(settings, backbone, store, alone)
    else:
        assert isinstance(backbone, str | os.PathLike), "one that is no list is a path"
        groups = [[replace(settings, backbone=backbone, store=store)]]
    data, said, seen = _read(settings, alone), set[str](), set[str]()
    for each in groups:
        growths = list[Growth]()
        for own in each:
            job = find_store(_prepare(own, data, alone, said))
            if job.id not in seen:
                seen.add(job.id)
                growths.append(plan_growth(job))
        yield growths


def _settings(dataset: str, more: dict[str, Any], ranks: Alone) -> Settings:
    """Return the settings of an extraction, whose backbone is still to be named. more: arguments of extract."""
    bound = signature(extract).bind("", dataset, **more)
    bound.apply_defaults()
    bound.arguments["workers"] = _workers(bound.arguments["workers"], ranks)
    return Settings(**bound.arguments)


def _held_together(
    settings: Settings,
    backbones: Sequence[str | os.PathLike[str]],
    place: str | os.PathLike[str] | None,
    ranks: Alone,
) -> list[list[Settings]]:
    """Return the settings for each of several checkpoints, in groups of those that are held at a time.

    place: the folder for their stores. Raises BadInput for a word that names no checkpoint.
    """
    files = checkpoint_files(backbones)
    named = zip(files, stems(files), strict=True)
    each = [replace(settings, backbone=file, place=place, stem=stem) for file, stem in named]
    groups = _groups(files, choose_device(settings.device, ranks.local_rank), ranks)
    return [each[start:end] for start, end in groups]


def _groups(files: Sequence[str], device: torch.device, ranks: Alone) -> list[tuple[int, int]]:
    """Return which checkpoints are held at a time, by the leading process's memory: (first, end) of each group."""
    if ranks.rank:
        return [(start, end) for start, end in ranks.shared()]
    budget, groups, held = free_bytes(device) / 2 / ranks.local_size, [(0, 0)], 0.0
    for number, file in enumerate(files):
        own = HELD + os.path.getsize(file)
        start, end = groups[-1]
        if end > start and held + own > budget:
            start, held = number, 0.0
            groups.append((start, start))
        held += own
        groups[-1] = (start, number + 1)
    return ranks.share(groups)


def _extract_together(each: Sequence[Settings], data: Dataset, ranks: Alone, seen: dict[str, str]) -> list[str]:
    """Bring the stores of some backbones up to date, and return their paths.

    each: settings that differ in the backbone and the store's place alone. seen: paths of stores by id, to which those of
    these backbones are added.
    """
    paths, unfinished, said = list[str](), list[Growth](), set[str]()
    for settings in each:
        job = find_store(_prepare(settings, data, ranks, said))
        if job.id in seen:
            ranks.say(f"notice: {settings.backbone} has the weights of another checkpoint: both have one store")
            paths.append(seen[job.id])
            continue
        paths.append(seen.setdefault(job.id, str(job.folder)))
        growth = plan_growth(job)
        # Other processes do as the leading one, which may see a store later and more of it.
        if ranks.rank or not growth.is_finished:
            unfinished.append(growth)
        else:
            id = merge(growth.parts).id
            ranks.say(f"store: {job.folder} is finished already (id {id[:8]}: same backbone, data and settings)")
    for growth, id in zip(unfinished, write(unfinished, ranks), strict=True):
        ranks.say(f"store: {growth.job.folder} (id {id[:8]})")
    return paths


def _workers(asked: int | None, ranks: Alone) -> int:
    """Return how many processes decode: by default half of this process's share of the cores, at least 1, at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // 2 // ranks.local_size)) if asked is None else asked


def _read(settings: Settings, ranks: Alone) -> Dataset:
    """Check what does not depend on the backbone, and read the dataset. Raises BadInput."""
    check_precision(settings.precision, choose_device(settings.device, ranks.local_rank))
    _check_masks(settings)
    data = read_dataset(settings.dataset, settings.root, settings.splits)
    for line in describe_classes(data):
        ranks.say(line)
    return data


def _prepare(settings: Settings, data: Dataset, ranks: Alone, said: set[str]) -> Job:
    """Load the backbone, and work out what the settings amount to. said: what need not be said again. Raises BadInput."""
    model = _load(settings, data)
    if isinstance(settings.backbone, torch.nn.Module):
        # Each process of torchrun built its own.
        own = [(model.weights_sha256,)]
        if (ranks.shared() if ranks.rank else ranks.share(own)) != own:
            raise BadInput("backbone: the processes' modules have different weights: load them, or seed alike")
    ranks.say(f"backbone: {model.load_report}")
    preprocessing = "\n  ".join((f"preprocessing: {model.preprocessing}", *model.preprocessing_report))
    if preprocessing not in said:
        ranks.say(preprocessing)
        said.add(preprocessing)
    return plan_job(settings, choose_device(settings.device, ranks.local_rank), data, model)


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
