"""What an extraction into a store that is there already has to add to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.extraction.job import Job, lay_out, name_of, plan_job
from featcache.feature import Feature
from featcache.names import MANIFEST
from featcache.store.additions import addition, merge
from featcache.store.folder import LocalFolder
from featcache.store.growing import whole_parts
from featcache.store.manifest import Manifest, difference, feature_of, split_of
from featcache.store.reader import Store
from featcache.store.records import changes
from featcache.store.writer import check_shards, missing_files, missing_shards


@dataclass(frozen=True)
class Growth:
    """What a job does to its store.

    job: of all that the store is going to hold, which may be more than was asked for: every feature is there for all
    splits. parts: of the store as it is, none if it is new. additions: what is added, not laid out yet.
    """

    job: Job
    parts: Sequence[Manifest] = ()
    additions: Sequence[Manifest] = ()

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to write. Raises BadInput if a file of a shard is damaged."""
        folder = self.job.folder
        if not self.parts or self.additions or missing_files(folder, merge(self.parts)):
            return False
        if any(missing_shards(folder, part) for part in self.parts):
            return False
        for part in self.parts:
            check_shards(folder, part)
        return True


def plan_growth(job: Job) -> Growth:
    """Work out what a job's store lacks. Raises BadInput if the store is another one, and says which images differ."""
    if MANIFEST not in job.folder.names():
        return Growth(job)
    parts = whole_parts(job.folder)
    store = merge(parts)
    _check_shared(job, parts)
    rest = set(job.names) - store.splits.keys() or {str(feature) for feature in job.features} - store.features.keys()
    if missing_shards(job.folder, parts[0]) and not _covers(job, parts[0]):
        # Who asks for less may not want what was begun, and who asks for something else wants it later.
        features = ",".join(parts[0].features)
        splits = ",".join(split for split in parts[0].splits if split_of(split) == split)
        raise BadInput(
            f"{job.folder} is another store, and is not whole yet: finish it first, by the same extract with --features "
            f"{features} --split {splits}; or give another --store"
        )
    if not rest:
        growth = Growth(job, parts)
        if _covers(job, store) or growth.is_finished:
            return growth
    whole = _of_both(job, parts)
    return Growth(whole, parts, _additions(whole, store))


def _covers(job: Job, manifest: Manifest) -> bool:
    """Return whether a job is of all that a manifest names."""
    features = {str(feature) for feature in job.features}
    return set(job.names) >= manifest.splits.keys() and features >= manifest.features.keys()


def _check_shared(job: Job, parts: Sequence[Manifest]) -> None:
    """Check that a job and a store have everything in common but features, splits and views. Raises BadInput."""
    store = merge(parts)
    common = job.data.splits.keys() & store.identity.get("dataset", {}).get("splits", {}).keys()
    old, new = (_shared(identity, common) for identity in (store.identity, job.identity))
    if old.keys() ^ new.keys() == {"views"}:
        old.pop("views", None)
        new.pop("views", None)
    if old != new:
        lines = [
            f"{job.folder} is another store (id {store.id[:8]}, asked for {job.id[:8]}): "
            + "; ".join(difference(old, new))
        ]
        begun = Store(job.folder, parts)
        for split in begun.splits:
            if split in common and old["dataset"]["splits"][split] != new["dataset"]["splits"][split]:
                lines.append(f"{split}: {changes(begun[split].arrays(), job.arrays[split])}")
        raise BadInput("; ".join([*lines, "the same command with another --store, or with none, writes a new one"]))
    if job.storage != store.storage:
        fields = "; ".join(difference(store.storage, job.storage))
        raise BadInput(f"{job.folder} is stored otherwise ({fields}): choose another --store, or use featcache convert")


def _shared(identity: dict[str, Any], splits: Sequence[str] | set[str]) -> dict[str, Any]:
    """Return those fields of an identity that do not change when a store grows. splits: those that are compared."""
    dataset, views = identity.get("dataset", {}), identity.get("views")
    kept = {split: mark for split, mark in dataset.get("splits", {}).items() if split in splits}
    shared = {**identity, "dataset": {**dataset, "splits": kept}}
    shared.pop("features", None)
    if views:
        shared["views"] = {field: value for field, value in views.items() if field not in ("count", "splits")}
    return shared


def _of_both(job: Job, parts: Sequence[Manifest]) -> Job:
    """Return the job of all that a store holds and a job asks for. Raises BadInput if the store's images changed."""
    store = merge(parts)
    splits = [split for split in store.splits if split_of(split) == split]
    settings, data, views = job.settings, job.data, store.identity.get("views")
    if not data.splits.keys() >= set(splits):
        splits += [split for split in data.splits if split not in splits]
        data = read_dataset(settings.dataset, settings.root, splits)
    known = job.backbone_features(map(feature_of, store.features))
    features = [*map(str, known), *(str(f) for f in job.backbone_features(job.features) if f not in known)]
    settings = replace(settings, features=features, store=job.folder, format=job.storage["format"])
    if views:
        count = max(views["count"], settings.views)
        settings = replace(settings, views=count, seed=views["seed"], crop_scale=views["scale"])
    whole = plan_job(settings, job.device, data, job.model)
    _check_shared(whole, parts)
    return whole


def _additions(job: Job, store: Manifest) -> list[Manifest]:
    """Return what a job adds to a store: new features for its splits and views, and all features for new ones."""
    plans = []
    features = [feature for feature in job.features if str(feature) not in store.features]
    if features:
        plans.append((features, list(store.splits)))
    names = [name for name in job.names if name not in store.splits]
    if names:
        plans.append((list(job.features), names))
    # A store goes on as it was begun; what a precision does is measured for each addition.
    compute = {field: value for field, value in store.compute.items() if field not in ("folded", "cosine")}
    return [_lay_out(job, features, names, compute) for features, names in plans]


def _lay_out(job: Job, features: Sequence[Feature], names: Sequence[str], compute: dict[str, Any]) -> Manifest:
    """Return the manifest of an addition of features to splits and views, given by their names."""
    views = {name: number for name, (_, number) in job.views.names().items() if name in names}
    identity = addition(job.identity, map(str, features), names, views)
    return replace(lay_out(job, identity, features, names), compute=compute)


def find_store(job: Job) -> Job:
    """Return a job with the place of a store that it can add to; the job itself if it has a place, or there is none.

    These are stores in the default folder, of the same dataset, backbone and settings, with or without the checkpoint's
    name in theirs. The one that holds most of the features that are asked for comes first.
    """
    if job.settings.store is not None or not isinstance(job.folder, LocalFolder) or MANIFEST in job.folder.names():
        return job
    place = Path(str(job.folder))
    fitting: list[tuple[int, str, Job]] = []
    for path in sorted(place.parent.glob(f"{escape(name_of(job.data, job.model))}*-????????{place.suffix}")):
        own = replace(job, folder=LocalFolder(path))
        try:
            parts = whole_parts(own.folder)
            _check_shared(own, parts)
        except BadInput:
            continue
        if merge(parts).id == job.id or not missing_shards(own.folder, parts[0]):
            held = sum(str(feature) in merge(parts).features for feature in job.features)
            fitting.append((-held, str(path), own))
    return min(fitting, key=lambda fit: fit[:2])[2] if fitting else job
