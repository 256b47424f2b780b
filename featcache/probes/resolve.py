"""What a grid says of a store: features, splits and views as the store has them, and what does not fit it."""

from dataclasses import dataclass, replace

from featcache.device import free_bytes, why_not
from featcache.errors import BadInput, nearest
from featcache.probes.engine.memory import state_bytes
from featcache.probes.grids.grid import refuse
from featcache.probes.inputs.input import Input
from featcache.probes.overlap import Overlap, find_overlaps
from featcache.probes.scores.metrics import default_metric, metrics_of
from featcache.probes.spec import ProbeSpec


@dataclass(frozen=True)
class Resolved:
    """A grid on a store. specs: with features, views and offsets as numbers and names of the store.

    splits: role (train, val, test) to the store's splits, without val or test where neither names such a split.
    metric: to select by. split: the role to select on, None where there is none: then nothing is chosen.
    overlaps: images that two roles share, which then is allowed. notice: of what could not be checked, or None.
    """

    specs: list[ProbeSpec]
    splits: dict[str, tuple[str, ...]]
    metric: str
    split: str | None
    overlaps: list[Overlap]
    notice: str | None


def resolve(grid, store, device, allow_overlap=False):
    """Bring a Grid to a store, to train on a device. Raises BadInput that names every field that does not fit.

    allow_overlap: whether two roles may share images, whatever the grid says.
    """
    errors = []
    splits = _splits(grid, store, errors)
    metric = _metric(grid, store, errors)
    # As the grid says, or val if there is one.
    split = grid.split or ("val" if "val" in splits else None)
    if split not in (None, *splits):
        errors.append(f"select.split: store {store.path} has no split {split!r} to choose on")
    if not splits.keys() & {split, "test"}:
        errors.append(
            f"splits: no images to score on: name val or test (store {store.path} has {', '.join(store.splits)})"
        )
    refuse(grid.path, errors)
    overlaps, notice = find_overlaps(store, splits)
    if not (allow_overlap or grid.allow_overlap):
        errors.extend(
            f"splits.{found.roles[1]}: {found} ({found.example}); keep the roles apart, or say --allow-overlap"
            for found in overlaps
        )
    views = {name: store[name].views for name in splits["train"]}
    specs, seen = [], {}
    for spec, group in zip(grid.specs, grid.groups, strict=True):
        if reason := why_not(spec.precision, device):
            errors.append(f"{group.where('precision')}: {spec.precision} {reason}")
        found = _spec(spec, group, store, views, errors)
        if found is None:
            continue
        if found.id in seen:
            errors.append(
                f"{group.path}: repeats a probe of {seen[found.id]}; features and views that they write differently "
                f"are one in store {store.path}"
            )
        seen[found.id] = group.path
        specs.append(found)
    without_epochs = [spec.optimizer.type for spec in grid.specs if spec.optimizer.full_batch]
    if grid.search and without_epochs:
        errors.append(
            f"search: halving compares probes after some epochs, and the optimizer {without_epochs[0]} has none"
        )
    if grid.search and not errors:
        _check_room(specs, store, device, errors)
    if split is None:
        _check_unchosen(grid, specs, store, errors)
    refuse(grid.path, errors)
    return Resolved(specs, splits, metric, split, overlaps, notice)


def undecided(specs):
    """Why these probes need a split to choose on, as a line for the user; None if they differ in their seeds alone."""
    count = len({spec.configuration for spec in specs})
    if count == 1:
        return None
    return (
        f"{count} configurations and no split to choose between them on: name one, as in splits: {{val: SPLIT}}, or "
        "say select: {split: train}; without, a grid has one configuration, of any number of seeds"
    )


def _check_unchosen(grid, specs, store, errors):
    """What asks for a choice in a grid without a split to choose on."""
    for spec, group in zip(grid.specs, grid.groups, strict=True):
        for field, asked in (("keep", spec.keep == "best"), ("patience", spec.patience > 0)):
            if asked:
                errors.append(f"{group.where(field)}: looks at scores of a split to choose on, and the grid has none")
    if grid.search:
        errors.append("search: halving looks at scores of a split to choose on, and the grid has none")
    if not errors and (reason := undecided(specs)):
        errors.append(f"probes: {reason} (store {store.path} has {', '.join(store.splits)})")


def _check_room(specs, store, device, errors):
    """A search holds all probes from rung to rung, where other grids train block after block."""
    needed = 0
    for spec in specs:
        dim, positions = Input.of(spec).shape(store)
        needed += state_bytes(spec.head, dim, len(store.classes), positions)
    free = free_bytes(device)
    if needed > free:
        errors.append(
            f"search: halving holds all {len(specs)} probes at once, {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free on {device}; make several grids of them"
        )


def _splits(grid, store, errors):
    roles = dict(grid.splits)
    for role in ("val", "test"):
        # VOC2012's test labels, for one, were never published, and CIFAR has no validation split.
        if role not in grid.content.get("splits", {}) and role not in store.splits:
            roles.pop(role, None)
    for role, names in roles.items():
        errors.extend(
            f"splits.{role}: store {store.path} has no split {name!r}{nearest(name, store.splits)} "
            f"(it has {', '.join(store.splits)})"
            for name in names
            if name not in store.splits
        )
    return roles


def _metric(grid, store, errors):
    metrics = metrics_of(store.task)
    metric = grid.metric or default_metric(store.task)
    if metric not in metrics:
        errors.append(f"select.metric: {metric!r} does not fit {store.task} labels; use {' or '.join(metrics)}")
    return metric


def _spec(spec, group, store, views, errors):
    """Return a spec as the store has it, or None and an error where it would be another model."""
    where = group.where("features")
    try:
        feature = store.manifest.feature(spec.features)
    except BadInput as error:
        errors.append(f"{where}: {error.message}")
        return None
    before, kind, spec = len(errors), feature.kind, replace(spec, features=str(feature))
    width, positions = Input.of(spec).shape(store)
    if kind == "tokens" and not spec.head.reads_tokens:
        layer = feature.layer
        errors.append(f"{where}: only an attentive head reads {feature}; take {layer}:cls, :patch_mean or :spatial")
    elif kind in ("pooled", "patch_mean") and not spec.head.pools_first:
        otherwise = "" if spec.head.reads_tokens else ", or say pool: before if that is what you want"
        errors.append(
            f"{where}: a head of type {spec.head.type} on {feature} is another model than on the map; take "
            f"{feature.layer}:spatial{otherwise}"
        )
    elif misfit := spec.head.misfit(feature, width, positions, spec.batch_size):
        field, reason = misfit
        errors.append(f"{group.where(field)}: {reason}")
    head = spec.head
    try:
        head = head.resolved(len(store.classes))
    except BadInput as error:
        errors.append(f"{group.where('head')}: {error.message}")
    count = _views(spec, group, store, views, errors)
    if len(errors) > before:
        return None
    found = replace(spec, head=head, views=count)
    if found.conflict:
        errors.append(f"{group.path}: {found.conflict}")
        return None
    return found


def _views(spec, group, store, views, errors):
    """The number of views that a probe trains on. views: {training split: how many the store has}."""
    if spec.views is None and len(set(views.values())) == 1:
        return next(iter(views.values()))
    if spec.views is not None and spec.views <= min(views.values()):
        return spec.views
    there = ", ".join(f"{count} of {name}" for name, count in views.items())
    asked = "all views" if spec.views is None else f"{spec.views} views"
    errors.append(
        f"{group.where('views')}: {asked} asked for, and store {store.path} has {there}; write views: 0 for the images "
        "as they are, or extract with --views"
    )
    return None
