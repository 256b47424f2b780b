"""A job: what an extraction's settings amount to, once the dataset is read and the backbone loaded."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.precision import cosine_to_float32
from featcache.datasets.record import Dataset
from featcache.errors import BadInput, nearest
from featcache.extraction.images import DECODERS, Images, check_decoder, image_batches
from featcache.extraction.masked import SHARD_PASSES, choose_images
from featcache.extraction.masks import parse_masks
from featcache.extraction.masks.masking import Masking
from featcache.extraction.settings import Settings
from featcache.extraction.views import Views, plan_views
from featcache.feature import Feature, parse_features
from featcache.names import MANIFEST
from featcache.store.additions import merge
from featcache.store.dtype import STORED
from featcache.store.folder import Folder, open_folder
from featcache.store.formats import FORMATS, choose_format
from featcache.store.growing import whole_parts
from featcache.store.manifest import Manifest, Storage, feature_of, identity_hash, plan, split_of
from featcache.store.reader import Store
from featcache.store.records import record_arrays
from featcache.store.writer import missing_files


@dataclass(frozen=True, eq=False)
class Job:
    """What is extracted from what, and into which store.

    features: of the store. identity, storage: see Manifest. arrays: the small arrays of each split. masking: how images
    are masked, None if they are taken as they are.
    """

    settings: Settings
    device: torch.device
    data: Dataset
    model: Backbone
    features: tuple[Feature, ...]
    views: Views
    identity: dict[str, Any]
    storage: Storage
    folder: Folder
    arrays: dict[str, dict[str, np.ndarray]]
    masking: Masking | None = None

    @property
    def id(self) -> str:
        """The id of the store."""
        return identity_hash(self.identity)

    @property
    def names(self) -> list[str]:
        """The names of all splits and views, in order."""
        return [*self.data.splits, *self.views.names()]

    def backbone_features(self, features: Iterable[Feature]) -> list[Feature]:
        """Return those of some features that the backbone yields: all but what is noted of masks."""
        return [feature for feature in features if not self.masking or feature != self.masking.noted]

    def all_arrays(self) -> dict[str, Mapping[str, np.ndarray]]:
        """Return the small arrays of all splits and views: those that the store has, as it has them."""
        arrays = self.views.arrays(self.arrays)
        if MANIFEST not in self.folder.names():
            return arrays
        parts = whole_parts(self.folder)
        if missing_files(self.folder, merge(parts)):
            return arrays
        store = Store(self.folder, parts)
        return {name: store[name].arrays() if name in store.manifest.splits else own for name, own in arrays.items()}

    def images(self, with_views: bool = True) -> Images:
        """Return the images of all splits and views."""
        names, arrays = (self.views.names(), self.all_arrays()) if with_views else ((), {})
        crops = {name: arrays[name]["augmentation"] for name in names}
        return Images(self.data, self.model.preprocessing, DECODERS[self.settings.decoder], crops)


def plan_job(settings: Settings, device: torch.device, data: Dataset, model: Backbone) -> Job:
    """Work out what the settings amount to. Raises BadInput for settings that are unknown or do not go together."""
    check_decoder(settings.decoder, model.preprocessing)
    masking = None if settings.masks is None else parse_masks(settings.masks)
    if masking:
        data = choose_images(data, model.preprocessing, settings.limit)
        default = "pooled"
    else:
        default = "pooled,spatial,cls" if model.class_token else "pooled,spatial"
    # Of what is neither text nor a list parse_features says that it is no name.
    unsaid = isinstance(settings.features, str | list | tuple | None) and not settings.features
    features = parse_features(default if unsaid else settings.features, model.aliases, model.layers)
    if masking and masking.noted:
        features += (masking.noted,)
    views = plan_views(data, settings.views, settings.seed, settings.crop_scale)
    format = choose_format(settings.format, settings.store)
    identity = _identity(settings, data, model, features) | views.describe()
    if masking:
        identity["masks"] = masking.model_dump()
    folder = open_folder(settings.store or _default_place(settings, data, model, identity, format))
    FORMATS[format].check_place(folder, settings.compression)
    storage: Storage = {"format": format, "compression": settings.compression}
    arrays = {split: record_arrays(data, split) for split in data.splits}
    return Job(settings, device, data, model, features, views, identity, storage, folder, arrays, masking)


def _identity(settings: Settings, data: Dataset, model: Backbone, features: tuple[Feature, ...]) -> dict[str, Any]:
    """Return what the features depend on, without the views."""
    dtype = settings.dtype
    if dtype not in STORED:
        raise BadInput(f"unknown dtype {dtype!r}{nearest(dtype, STORED)} (known: {', '.join(STORED)})")
    return {
        "arch": model.arch,
        "weights_sha256": model.weights_sha256,
        "preprocessing": model.preprocessing.describe(),
        "features": sorted(str(f) for f in features),
        "dtype": dtype,
        "precision": settings.precision,
        "dataset": {"name": data.name, "splits": {split: data.fingerprint(split) for split in data.splits}},
        # The default is left out, so that stores from before there was a choice keep their ids.
        **({"decoder": DECODERS[settings.decoder]} if settings.decoder != "exact" else {}),
    }


def name_of(data: Dataset, model: Backbone) -> str:
    """Return what the default names of stores begin with."""
    return f"{data.name}-{model.arch.replace(':', '-')}"


def _default_place(
    settings: Settings, data: Dataset, model: Backbone, identity: dict[str, Any], format: str
) -> str | Path:
    masks = f"-{identity['masks']['type']}" if "masks" in identity else ""
    stem = f"-{settings.stem}" if settings.stem else ""
    name = f"{name_of(data, model)}{stem}{masks}-{identity_hash(identity)[:8]}{FORMATS[format].SUFFIX}"
    place = os.fspath(settings.place or "features")
    return f"{place.rstrip('/')}/{name}" if "://" in place else Path(place) / name


def lay_out(
    job: Job,
    identity: dict[str, Any] | None = None,
    features: Iterable[Feature] | None = None,
    names: Iterable[str] | None = None,
) -> Manifest:
    """Return the manifest of the job's store, or of an addition to it, whose `files` are still empty.

    identity, features, names: of an addition, with the names of its splits and views.
    """
    shapes = row_shapes(job)
    return plan(
        identity=identity or job.identity,
        rows={name: len(job.data.splits[split_of(name)]) for name in names or job.names},
        shapes={feature: shapes[feature] for feature in features or job.features},
        dtype=job.settings.dtype,
        aliases=job.model.aliases,
        classes=job.data.classes,
        task=job.data.task,
        compute={
            "device": job.device.type,
            "threads": torch.get_num_threads() if job.device.type == "cpu" else None,
            "batch_size": job.settings.batch_size,
        },
        storage=job.storage,
        most_rows=None if job.masking is None else max(1, SHARD_PASSES // _variants(job)),
    )


def row_shapes(job: Job) -> dict[Feature, tuple[int, ...]]:
    """Return the shape of one row of each feature, found by running the backbone on a black image."""
    preprocessing = job.model.preprocessing
    black = torch.zeros(1, 3, preprocessing.size, preprocessing.size, dtype=torch.uint8)
    backbone_features = job.backbone_features(job.features)
    with torch.inference_mode():
        results = job.model(preprocessing.normalise(black), backbone_features)
    shapes = {feature: tuple(results[str(feature)].shape[1:]) for feature in backbone_features}
    if job.masking:
        shapes = {feature: (_variants(job), *shape) for feature, shape in shapes.items()}
        if job.masking.noted:
            shapes[job.masking.noted] = (1, preprocessing.size, preprocessing.size)
    return shapes


def _variants(job: Job) -> int:
    """Return how many variants of each image there are. Only a job with masks has any."""
    assert job.masking is not None, "there are masks"
    return job.masking.number(job.model.preprocessing.size)


def measured(job: Job, manifest: Manifest) -> Manifest:
    """Return the manifest with the cosine to float32 of the first image's features; one image costs next to nothing."""
    images = job.images(with_views=False)
    ((image, _),) = image_batches(images, [[(next(iter(images.splits)), 0)]], workers=0)
    image = job.model.to(job.device).preprocessing.normalise(image.to(job.device))
    cosine = cosine_to_float32(
        job.model, image, job.backbone_features(map(feature_of, manifest.features)), job.settings.precision
    )
    return replace(manifest, compute=manifest.compute | {"cosine": cosine})
