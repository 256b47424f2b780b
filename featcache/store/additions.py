"""Stores that grow: one manifest says what was there first, and one more says what each addition brought.

A store's parts are its first manifest and its additions, in the order in which they became whole. Each part has shards of
its own, and says with them where the features of its splits lie. An addition that is not whole is not a part.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from featcache.errors import BadInput, shown
from featcache.names import ADDITION, MANIFEST
from featcache.store.folder import Folder
from featcache.store.manifest import Manifest, parse_manifest, read_manifest, remedy, split_of
from featcache.store.manifest_fields import check_names


def find_additions(folder: Folder) -> list[Manifest]:
    """Return all additions in a folder, whole or not. Raises BadInput if the manifest of one is damaged."""
    additions = []
    for name in sorted(filter(ADDITION.fullmatch, folder.names())):
        try:
            additions.append(parse_manifest(folder.read(name), folder, name))
        except FileNotFoundError:
            raise BadInput(f"damaged manifest {folder}/{name}: it is no file; {remedy(folder)}") from None
    return additions


def read_parts(folder: Folder) -> list[Manifest]:
    """Return the parts of a store. Raises BadInput if there is no store, or a manifest is damaged."""
    return order_parts(folder, read_manifest(folder), find_additions(folder))


def order_parts(folder: Folder, first: Manifest, additions: Iterable[Manifest], lost: bool = False) -> list[Manifest]:
    """Return the first manifest of a store and its whole additions, in order.

    lost: leave out additions if the one before them is lost. Raises BadInput if an addition does not fit the store.
    """
    parts, merged = [first], first
    following = {addition.after: addition for addition in additions if addition.after is not None}
    while merged.id in following:
        parts.append(following.pop(merged.id))
        merged = _with(folder, merged, parts[-1])
    if following and not lost:
        names = ", ".join(addition.file_name for addition in following.values())
        raise BadInput(f"store {folder} has lost the addition before {names}; run the extract again that made it")
    return parts


def merge(parts: Sequence[Manifest]) -> Manifest:
    """Return one Manifest of all parts of a store: that of the same store extracted at once, but for the shards.

    Its id is the store's. The geometry of a split is that of the first part that has it.
    """
    return reduce(_merged, parts)


def ids_of_parts(parts: Sequence[Manifest]) -> tuple[str, ...]:
    """Return all ids that a store has had, the present one last."""
    return tuple(merge(parts[: count + 1]).id for count in range(len(parts)))


def part_of(parts: Sequence[Manifest], split: str, feature: str) -> Manifest:
    """Return the part that holds a feature of a split."""
    return next(part for part in parts if split in part.splits and feature in part.features)


def addition(
    identity: Mapping[str, Any], features: Iterable[str], splits: Sequence[str], views: Mapping[str, int]
) -> dict[str, Any]:
    """Return the identity of an addition to a store.

    identity: of the store with the addition. features, splits: what is added, splits with views. views: the views
    among the splits, {name of a view: its number}.
    """
    bases = {split_of(name) for name in splits}
    dataset = identity["dataset"]
    known = {split: mark for split, mark in dataset["splits"].items() if split in bases}
    own = {**identity, "features": sorted(features), "dataset": {**dataset, "splits": known}, "adds": list(splits)}
    if views:
        augmented = [split for split in identity["views"]["splits"] if split in {split_of(name) for name in views}]
        own["views"] = {**identity["views"], "count": max(views.values()), "splits": augmented}
    else:
        own.pop("views", None)
    return own


def _with(folder: Folder, store: Manifest, added: Manifest) -> Manifest:
    """Return the Manifest of a store with an addition. Raises BadInput if it does not fit the store."""
    where = f"{folder}/{added.file_name}"
    for field in ("storage", "classes", "task"):
        if getattr(store, field) != getattr(added, field):
            raise BadInput(f"damaged manifest {where}: its {field} is not that of the store")
    if any(
        added.splits[name]["rows"] != store.splits[name]["rows"] for name in added.splits.keys() & store.splits.keys()
    ):
        raise BadInput(f"damaged manifest {where}: its splits have other rows than the store's")
    # Every feature stays there for all splits.
    more_features = added.splits.keys() == store.splits.keys() and not added.features.keys() & store.features.keys()
    more_splits = added.features.keys() == store.features.keys() and not added.splits.keys() & store.splits.keys()
    if not (more_features or more_splits):
        raise BadInput(f"damaged manifest {where}: it adds neither features for all splits nor splits of all features")
    if more_splits and any(added.features[name]["shape"] != spec["shape"] for name, spec in store.features.items()):
        raise BadInput(f"damaged manifest {where}: its features have other shapes than the store's")
    merged = _merged(store, added)
    try:
        check_names(merged.splits, merged.features)
    except BadInput as error:
        raise BadInput(f"manifest {where} is not one that featcache wrote: {error.message}") from None
    return merged


def _merged(store: Manifest, added: Manifest) -> Manifest:
    before, own = store.identity, added.identity
    dataset, more = (identity.get("dataset", {}) for identity in (before, own))
    identity = {
        **before,
        "features": sorted({*store.features, *added.features}),
        "dataset": {**dataset, "splits": dataset.get("splits", {}) | more.get("splits", {})},
    }
    if "views" in own:
        known = before.get("views", {"count": 0, "splits": []})
        splits = [*known["splits"], *(split for split in own["views"]["splits"] if split not in known["splits"])]
        identity["views"] = {**own["views"], "count": max(known["count"], own["views"]["count"]), "splits": splits}
    return replace(
        store,
        identity=identity,
        splits={**store.splits, **{name: own for name, own in added.splits.items() if name not in store.splits}},
        features=store.features | added.features,
        files=store.files | added.files,
    )


def read_file(folder: Folder, manifest: Manifest, name: str) -> bytes:
    """Return the bytes of a file that the manifest names. Raises BadInput if it is gone or damaged.

    A file that lists all features is written anew when a store grows: just before that it may be a file of the addition,
    and afterwards a manifest that was read before is behind it.
    """
    if name not in manifest.files:
        raise BadInput(f"the manifest of store {folder} does not name {shown(name)}")
    try:
        data = folder.read(name)
    except FileNotFoundError:
        raise BadInput(f"missing file {folder}/{name}; {remedy(folder)}") from None
    if not fits(data, manifest, name):
        additions = find_additions(folder) if MANIFEST in folder.names() else []
        newest = [merge(order_parts(folder, read_manifest(folder), additions))] if additions else []
        if not any(fits(data, other, name) for other in (*newest, *(a for a in additions if a.after is None))):
            raise BadInput(f"damaged file {folder}/{name}; {remedy(folder)}")
    return data


def fits(data: bytes, manifest: Manifest, name: str) -> bool:
    """Return whether a file's bytes are those that a manifest names."""
    return manifest.files.get(name) == {"bytes": len(data), "crc32": zlib.crc32(data)}
