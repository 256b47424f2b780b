"""Writing what stores lack: several stores at once if they read the same images."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from featcache.errors import BadInput
from featcache.extraction.fill import fill
from featcache.extraction.growing import Growth, plan_growth
from featcache.extraction.job import Job, lay_out, measured
from featcache.names import MANIFEST
from featcache.ranks import Alone
from featcache.store.additions import find_additions, merge, read_parts
from featcache.store.folder import Folder
from featcache.store.growing import begin_addition, discard_if_begun, publish, restore, whole_parts
from featcache.store.manifest import Manifest, read_manifest, split_of
from featcache.store.reader import Store
from featcache.store.records import with_axes
from featcache.store.shard import Shard
from featcache.store.writer import check_is_free, check_whole, create_store, discard_if_empty, missing_shards
from featcache.words import written

# Below this cosine a precision's features are no longer those of the network.
TRUSTED_COSINE = 0.99


@dataclass(eq=False)
class Writing:
    """A store while it is written.

    planned: the manifest of a new store, or of the additions to one. parts: the manifests of what is written, once it
    is begun. todo: the shards that were missing then.
    """

    growth: Growth
    planned: Sequence[Manifest]
    parts: list[Manifest] = field(default_factory=list)
    todo: list[Shard] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """What the store is going to hold."""
        return self.growth.job

    @property
    def folder(self) -> Folder:
        """The store's folder."""
        return self.job.folder

    def by_part(self) -> list["Writing"]:
        """Return the parts that lack shards, each by itself: shards of two parts may be of the same rows."""
        own = {part.file_name: [shard for shard in self.todo if shard.manifest is part] for part in self.parts}
        return [Writing(self.growth, self.planned, [p], own[p.file_name]) for p in self.parts if own[p.file_name]]

    def missing(self) -> list[Shard]:
        """Return the shards that are missing now."""
        return _missing(self.folder, self.parts)


def write(growths: Sequence[Growth], ranks: Alone) -> list[str]:
    """Write what stores lack, together with the other processes; return the stores' ids.

    growths: for each store, what is asked for as it was found. They agree in all settings but the backbone and what
    follows from it. Stores that stay empty are removed. All but the leading process return empty ids.
    """
    # Laid out before the folders are locked, which makes them.
    stores = [Writing(own, own.additions if own.parts else [lay_out(own.job)]) for own in growths]
    with ExitStack() as locks:
        leads = ranks.rank == 0
        # Two commands that lock the same stores in one order never wait for each other.
        for store in sorted(stores, key=lambda store: str(store.folder)):
            waiting = f"waiting: another process is extracting into {store.folder}"
            locks.enter_context(ranks.leading(store.folder.locked(waiting)))
        try:
            _begin_all(stores, ranks) if leads else _join(stores, ranks)
            for store in stores:
                _check_as_begun(store.job, store.parts, ranks)
            _check_room(stores, ranks)
            for together in passes(stores):
                # The shards of each pass are drawn and counted by themselves.
                ranks.share([]) if leads else ranks.shared([])
                _fill(together, [store.todo for store in together], ranks)
            while leads and (left := ranks.left_behind(lambda: [s for store in stores for s in store.missing()])):
                ranks.say(f"notice: no news of {len(left)} shards that other processes took; doing them here")
                for together in passes(stores):
                    _fill(together, [store.missing() for store in together], ranks.alone())
            return [_finish(store.job, store.parts) if leads else "" for store in stores]
        except BaseException:
            if ranks.size == 1:
                for store in stores:
                    discard_if_begun(store.folder, store.growth.additions)
                    discard_if_empty(store.folder, (store.growth.parts or store.planned)[0])
            raise


def plan_writing(growth: Growth, ranks: Alone) -> Writing:
    """Return what would be written of a store, with the shards that are missing. Nothing is written.

    Raises BadInput where `write` would do so before its first shard, but for a lack of room.
    """
    folder, additions = growth.job.folder, list(growth.additions)
    if growth.parts:
        begun = {part.id: part for part in find_additions(folder)}
        additions = [begun.get(addition.id, addition) for addition in additions]
    else:
        check_is_free(folder)
        additions = [lay_out(growth.job)]
    store = Writing(growth, additions, [*growth.parts, *additions])
    store.todo = store.missing()
    if store.todo:
        _check_as_begun(growth.job, growth.parts, ranks)
    return store


def _missing(folder: Folder, parts: Sequence[Manifest]) -> list[Shard]:
    return [shard for part in parts for shard in missing_shards(folder, part)]


def _begin_all(stores: Sequence[Writing], ranks: Alone) -> None:
    """Begin to write stores, and tell the other processes what is missing."""
    for store in stores:
        folder, parts = store.folder, store.growth.parts
        if MANIFEST in folder.names() and parts != whole_parts(folder):
            # Another process has made it, or added to it, meanwhile.
            store.growth = plan_growth(store.job)
            store.planned = store.growth.additions
        store.parts = _begin(store.growth, store.planned, ranks)
        store.todo = store.missing()
    # By folders, since the others do not know which stores are finished.
    ranks.share([(str(s.folder), s.manifest.file_name, s.split, s.number) for store in stores for s in store.todo])


def _begin(growth: Growth, planned: Sequence[Manifest], ranks: Alone) -> list[Manifest]:
    """Make the store or the additions to it, or restore what is lost of them; return the manifests of all parts.

    planned: the manifest of a new store, or of the additions.
    """
    job, folder = growth.job, growth.job.folder
    arrays = {split: with_axes(own) for split, own in job.all_arrays().items()}
    if not growth.parts:
        if job.settings.precision != "float32" and MANIFEST not in folder.names():
            planned = [measured(job, planned[0])]
        return [create_store(folder, planned[0], arrays)]
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
    return parts


def _join(stores: Sequence[Writing], ranks: Alone) -> None:
    """Wait until the leading process has begun the stores; note their parts that have missing shards, and these."""
    places = ranks.shared([] if all(store.growth.is_finished for store in stores) else None)
    for store in stores:
        own = [place[1:] for place in places if place[0] == str(store.folder)]
        if own:
            folder, files = store.folder, {name for name, _, _ in own}
            parts = {part.file_name: part for part in (read_manifest(folder), *find_additions(folder))}
            store.parts = [part for part in parts.values() if part.file_name in files]
            store.todo = [Shard(folder, parts[name], split, shard) for name, split, shard in own]


def passes(stores: Sequence[Writing]) -> list[list[Writing]]:
    """Return the parts of stores that lack shards, in groups that can be written in one pass over the images."""
    groups: dict[str, list[Writing]] = {}
    for number, part in enumerate(part for store in stores for part in store.by_part()):
        groups.setdefault(_reading(part, number), []).append(part)
    return list(groups.values())


def _reading(store: Writing, number: int) -> str:
    """Return how a part of a store reads images, as text: what two have in common that share a pass."""
    job, compute = store.job, store.todo[0].manifest.compute
    if job.masking:
        # Which images are masked depends on the preprocessing, and variants take most of the time anyway.
        return str(number)
    size = compute["batch_size"]
    # Batches end where shards do. Where that is the end of a batch anyway, shards may be of any length.
    lengths = {(shard.split, shard.manifest.splits[shard.split]["shard_rows"]) for shard in store.todo}
    ends = sorted((split, rows) for split, rows in lengths if rows % size)
    seen = {k: v for k, v in job.model.preprocessing.describe().items() if k not in ("mean", "std", "inverse", "bgr")}
    return json.dumps([size, compute["threads"], ends, seen, list(job.data.splits), job.views.describe()])


def _fill(together: Sequence[Writing], todo: Sequence[Sequence[Shard]], ranks: Alone) -> None:
    """Write shards of stores in one pass over the images, with as many threads as the stores were begun with."""
    threads = together[0].todo[0].manifest.compute["threads"]
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    jobs = [store.job for store in together]
    fill(jobs, todo, jobs[0].images(), ranks)


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


def _check_as_begun(job: Job, parts: Sequence[Manifest], ranks: Alone) -> None:
    """Say what a begun store fixes because it can change the last bits of a feature. Raises BadInput if it cannot be kept."""
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


def _check_room(stores: Sequence[Writing], ranks: Alone) -> None:
    """Raise BadInput before hours of work that cannot be stored, and say how much of the disk the views take."""
    before = 0
    for store in stores:
        sizes = [len(shard) * sum(map(shard.manifest.row_bytes, shard.manifest.features)) for shard in store.todo]
        needed, free = sum(sizes), store.folder.free_bytes()
        if store.job.masking and store.todo:
            ranks.say(_say_masks(store.job, store.todo, needed))
        parts = zip(store.todo, sizes, strict=True)
        views = sum(size for shard, size in parts if split_of(shard.split) != shard.split)
        if views:
            ranks.say(f"disk: {needed / 1e6:,.0f} MB to write, {views / 1e6:,.0f} of them views")
        # Stores of one command lie in one place.
        if free is not None and store.job.storage["compression"] is None and before + needed > free:
            raise BadInput(
                f"{store.folder}: {(before + needed) / 1e9:.2f} GB are still to be written, the disk has "
                f"{free / 1e9:.2f} GB free"
            )
        before += needed
