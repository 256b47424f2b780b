"""What an extraction would write, and how long it would take, without writing anything."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from featcache.datasets.record import Dataset
from featcache.extraction.extract import growths_of
from featcache.extraction.fill import stretches
from featcache.extraction.speed import decode_speed, forward_speed, together
from featcache.extraction.write import Writing, passes, plan_writing
from featcache.ranks import Alone
from featcache.store.additions import merge
from featcache.store.folder import Folder
from featcache.store.manifest import Manifest, feature_of
from featcache.store.shard import all_shards
from featcache.store.writer import missing_shards


class MissingShard(NamedTuple):
    """A shard that is not committed. part: the name of the manifest that names it, of the store or of an addition."""

    store: str
    part: str
    split: str
    shard: int


@dataclass(frozen=True)
class PlannedFeature:
    """A feature of a planned store. bytes, bytes_to_write: of its files, before compression."""

    name: str
    shape: tuple[int, ...]
    row_bytes: int
    rows: int
    bytes: int
    bytes_to_write: int


@dataclass(frozen=True, repr=False)
class PlannedStore:
    """A store as it will be.

    state: new, begun, growing (features, splits or views are added) or finished. splits: rows of each split and view.
    images_to_run: rows that the backbone has not seen yet. shards, shards_to_write: their numbers. parts: the manifests
    of the store and of its additions.
    """

    backbone: str
    arch: str
    path: str
    id: str
    state: str
    splits: dict[str, int]
    features: tuple[PlannedFeature, ...]
    images_to_run: int
    shards: int
    shards_to_write: int
    compression: str | None
    folder: Folder
    parts: tuple[Manifest, ...]

    def __repr__(self) -> str:
        return f"PlannedStore({self.path!r}, {self.state}, {self.shards_to_write} of {self.shards} shards to write)"

    @property
    def rows(self) -> int:
        """Number of rows of all splits and views."""
        return sum(self.splits.values())

    @property
    def bytes(self) -> int:
        """Bytes of the files of all features, before compression."""
        return sum(feature.bytes for feature in self.features)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of those files that are missing, before compression."""
        return sum(feature.bytes_to_write for feature in self.features)

    def missing(self) -> list[MissingShard]:
        """Return the shards that are missing now, in order."""
        return [
            MissingShard(self.path, part.file_name, shard.split, shard.number)
            for part in self.parts
            for shard in missing_shards(self.folder, part)
        ]


@dataclass(frozen=True)
class PlannedPass:
    """One pass over the images, for all stores that read them alike.

    images: how many are decoded. decode, forward: images a second where nothing else is done; forward is through all
    backbones of the pass. seconds: an estimate of the whole pass, without writing. None if nothing was measured.
    """

    stores: tuple[str, ...]
    images: int
    decode: float | None
    forward: float | None
    seconds: float | None

    @property
    def bottleneck(self) -> str | None:
        """What takes longer, decode or forward."""
        if self.decode is None or self.forward is None:
            return None
        return "decode" if self.decode < self.forward else "forward"


@dataclass(frozen=True, repr=False)
class ExtractionPlan:
    """What an extraction would write. free: bytes of free disk where the stores lie, None if no limit is known."""

    stores: tuple[PlannedStore, ...]
    passes: tuple[PlannedPass, ...]
    device: str
    workers: int
    free: int | None

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all files of features that are missing, before compression."""
        return sum(store.bytes_to_write for store in self.stores)

    @property
    def fits(self) -> bool | None:
        """Whether the disk has room for what is to be written; None if that is not known, as with compression."""
        if self.free is None or (self.bytes_to_write > self.free and any(s.compression for s in self.stores)):
            return None
        return self.bytes_to_write <= self.free

    @property
    def seconds(self) -> float | None:
        """About how many seconds the passes take on this machine, without writing; None if nothing was measured."""
        known = [one.seconds for one in self.passes if one.seconds is not None]
        return sum(known) if len(known) == len(self.passes) else None

    def missing(self) -> list[MissingShard]:
        """Return the shards of all stores that are missing now, in order. It lists folders, and reads no shard."""
        return [shard for store in self.stores for shard in store.missing()]


def plan_extraction(
    backbone: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], dataset: str, measure: bool, **more: Any
) -> tuple[ExtractionPlan, Dataset]:
    """Plan what extract, or extract_many for a list of backbones, would do; return the plan and the dataset.

    more: arguments of theirs. measure: whether to measure how fast images are decoded and run. Raises BadInput.
    """
    planned, all_passes, speeds = list[PlannedStore](), list[PlannedPass](), dict[str, float]()
    for growths in growths_of(backbone, dataset, **more):
        stores = [plan_writing(growth, Alone()) for growth in growths]
        planned += map(_planned, stores)
        all_passes += [_pass(alike, measure, speeds) for alike in passes(stores)]
        job = stores[-1].job
    return (
        ExtractionPlan(
            stores=tuple(planned),
            passes=tuple(all_passes),
            device=str(job.device),
            workers=job.settings.workers,
            free=job.folder.free_bytes(),
        ),
        job.data,
    )


def _planned(store: Writing) -> PlannedStore:
    """Return the figures of a store."""
    job, growth = store.job, store.growth
    there = merge(growth.parts) if growth.parts else None
    splits, features, shards = dict[str, int](), list[PlannedFeature](), 0
    sizes, left = Counter[str](), Counter[str]()
    for part in store.parts:
        splits |= {split: geometry["rows"] for split, geometry in part.splits.items()}
        own = all_shards(store.folder, part)
        shards += len(own)
        for name in part.features:
            sizes[name] += sum(shard.file_bytes(name) for shard in own)
            left[name] += sum(shard.file_bytes(name) for shard in store.todo if shard.manifest is part)
    for name, size in sizes.items():
        first = next(part for part in store.parts if name in part.features)
        shape = tuple(first.features[name]["shape"])
        rows = sum(splits[split] for split in {s for p in store.parts if name in p.features for s in p.splits})
        features.append(PlannedFeature(name, shape, first.row_bytes(name), rows, size, left[name]))
    state = "growing" if growth.additions else "new" if not there else "begun" if store.todo else "finished"
    return PlannedStore(
        backbone=str(job.settings.backbone),
        arch=job.model.arch,
        path=str(job.folder),
        id=there.id if there and not growth.additions else job.id,
        state=state,
        splits=splits,
        features=tuple(features),
        images_to_run=sum(map(len, stretches([store.todo]))),
        shards=shards,
        shards_to_write=len(store.todo),
        compression=job.storage["compression"],
        folder=store.folder,
        parts=tuple(store.parts),
    )


def _pass(stores: Sequence[Writing], measure: bool, speeds: dict[str, float]) -> PlannedPass:
    """Plan one pass. speeds: those that were measured, to which new ones are added."""
    todo, job = stretches([store.todo for store in stores]), stores[0].job
    images, paths = sum(map(len, todo)), tuple(dict.fromkeys(str(store.folder) for store in stores))
    if not measure:
        return PlannedPass(paths, images, None, None, None)
    decode, pixels = decode_speed(job.images(), todo, job.settings.workers)
    forward_seconds = 0.0
    for store in stores:
        features = dict.fromkeys(feature_of(name) for shard in store.todo for name in shard.manifest.features)
        # Checkpoints of one architecture take equally long.
        alike = f"{store.job.model.arch} {store.job.model.preprocessing.size} {[*map(str, features)]}"
        if alike not in speeds:
            speeds[alike] = forward_speed(store.job, list(features), pixels)
        forward_seconds += sum(map(len, stretches([store.todo]))) / speeds[alike]
    seconds = together(images / decode, forward_seconds, job.settings.workers, torch.device(job.device))
    return PlannedPass(paths, images, decode, images / forward_seconds, seconds)
