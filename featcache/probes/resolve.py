"""Fit a grid to a store: its features, splits and views as the store has them, or errors where they do not fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from featcache.device import free_bytes, why_not
from featcache.errors import BadInput, nearest
from featcache.feature import beside, parse_beside
from featcache.probes.engine.memory import state_bytes
from featcache.probes.grids.grid import Grid, refuse
from featcache.probes.grids.grid_file import Group
from featcache.probes.inputs.input import Input
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.overlap import Overlap, find_overlaps
from featcache.probes.refit import why_no_refit
from featcache.probes.sample import FOLDS
from featcache.probes.scores.metrics import default_metric, known_metrics
from featcache.probes.solvers.solver import FullBatchSolver
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store


@dataclass(frozen=True)
class Resolved:
    """A grid on a store.

    specs: their features, views and offsets are names and numbers of the store. splits: {role: splits of the store},
    without val or test where neither grid nor store names such a split. metric: by which probes are chosen. chosen_on:
    the role on which they are chosen, or FOLDS; None where nothing is. folds: of train, None where there are none.
    overlaps: images that two roles share, where the grid allows it. notice: a line about what could not be checked, or
    None. sets: the images that each spec trains on.
    """

    specs: list[ProbeSpec]
    splits: dict[str, tuple[str, ...]]
    metric: str
    chosen_on: str | None
    folds: int | None
    overlaps: list[Overlap]
    notice: str | None
    sets: TrainingSets


def resolve(grid: Grid, store: Store, device: torch.device, allow_overlap: bool = False) -> Resolved:
    """Fit a grid to a store, for training on a device. Raises BadInput that names every field that does not fit.

    allow_overlap: whether two roles may share images, whatever the grid says.
    """
    if "masks" in store.manifest.identity:
        raise BadInput(
            f"store {store.path} is of masked images, which are for attribute: train probes on a store of images as they are"
        )
    errors: list[str] = []
    splits = _splits(grid, store, errors)
    metric = _metric(grid, store, errors)
    folds = grid.selection.folds
    chosen_on = None if grid.reports_all else grid.chosen_on or ("val" if "val" in splits else None)
    if chosen_on not in (None, FOLDS, *splits):
        errors.append(f"select.split: store {store.path} has no split {chosen_on!r} to choose on")
    if folds and "test" not in splits:
        errors.append(
            f"select.folds: what is chosen by folds is scored on test, and store {store.path} has no such split"
        )
    elif not splits.keys() & {chosen_on, "test"}:
        errors.append(
            f"splits: no images to score on: name val or test (store {store.path} has {', '.join(store.splits)})"
        )
    refuse(grid.title, errors)
    overlaps, notice = find_overlaps(store, splits)
    if not (allow_overlap or grid.allow_overlap):
        errors.extend(
            f"splits.{overlap.roles[1]}: {overlap} ({overlap.example}); keep the roles apart, or say --allow-overlap"
            for overlap in overlaps
        )
    views = {name: store[name].views for name in splits["train"]}
    specs: list[ProbeSpec] = []
    seen: dict[str, str] = {}
    sets = TrainingSets(store, splits, device)
    for spec, group in zip(grid.specs, grid.groups, strict=True):
        if reason := why_not(spec.precision, device):
            errors.append(f"{group.where('precision')}: {spec.precision} {reason}")
        if spec.finetune:
            errors.append(
                f"{group.where('finetune')}: trains the backbone, which a store does not hold: run featcache finetune"
            )
        resolved = _spec(spec, group, store, views, errors)
        resolved = resolved and sampled(resolved, folds, group, sets, errors, chosen_on)
        if resolved and (reason := resolved.head.short_of(len(sets[resolved.sample]))):
            errors.append(f"{group.where('head')}: {reason}")
        if resolved is None:
            continue
        if reason := _unfit(resolved, sets, store.classes):
            errors.append(f"{group.path}: {reason}")
        if resolved.id in seen:
            errors.append(
                f"{group.path}: repeats a probe of {seen[resolved.id]}; "
                f"{'lists' if resolved.subset else 'features and views'} that they write differently are one in store "
                f"{store.path}"
            )
        seen[resolved.id] = group.path
        specs.append(resolved)
    without_epochs = [spec.optimizer.type for spec in grid.specs if spec.optimizer.full_batch]
    if grid.search and without_epochs:
        errors.append(
            f"search: halving compares probes after some epochs, and the optimizer {without_epochs[0]} has none"
        )
    if grid.search and not errors:
        _check_room(specs, store, device, errors)
    if chosen_on == "train":
        errors.extend(
            f"{group.where('head')}: to be chosen on the training images, a head of type {spec.head.type} must leave each "
            "of them out in turn: say leave_one_out: true"
            for spec, group in zip(grid.specs, grid.groups, strict=True)
            if not spec.head.scored_on_training
        )
    if chosen_on in (None, FOLDS):
        _check_no_split(grid, chosen_on, errors)
    if chosen_on is None and not errors and not grid.reports_all and (reason := undecided(specs)):
        errors.append(f"probes: {reason} (store {store.path} has {', '.join(store.splits)})")
    if grid.refit:
        errors.extend(f"refit: {reason}" for reason in why_no_refit(grid.refit, specs, splits, chosen_on))
    refuse(grid.title, errors)
    return Resolved(specs, splits, metric, chosen_on, folds, overlaps, notice, sets)


def undecided(specs: Sequence[ProbeSpec], folds: bool = True) -> str | None:
    """Say why these probes need a split to choose on, in a line for the user; None if they differ only in their seeds.

    folds: whether they could be chosen by folds instead.
    """
    count = len({spec.configuration for spec in specs})
    if count == 1:
        return None
    ways = "{split: train} or {folds: 5}" if folds else "{split: train}"
    return (
        f"{count} configurations and no split to choose between them on: name one, as in splits: {{val: SPLIT}}, or "
        f"say select: {ways}, or {{split: none}} to choose nothing and report all; without, a grid has one configuration, "
        "of any number of seeds"
    )


def _check_no_split(grid: Grid, chosen_on: str | None, errors: list[str]) -> None:
    """Add an error for everything that looks at a split while it trains, in a grid without a split to choose on."""
    reason = "looks at scores of a split to choose on, and the grid " + (
        "chooses by folds" if chosen_on else "has none"
    )
    for spec, group in zip(grid.specs, grid.groups, strict=True):
        for field, asked in (("keep", spec.keep == "best"), ("patience", spec.patience > 0)):
            if asked:
                errors.append(f"{group.where(field)}: {reason}")
    if grid.search:
        errors.append(f"search: halving {reason}")


def _check_room(specs: Sequence[ProbeSpec], store: Store, device: torch.device, errors: list[str]) -> None:
    """Add an error if the probes of a search, which holds all of them between rungs, do not fit into memory."""
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


def _splits(grid: Grid, store: Store, errors: list[str]) -> dict[str, tuple[str, ...]]:
    """Return {role: splits of the store}, and add an error for every split that the store lacks."""
    roles = dict(grid.splits)
    for role in ("val", "test"):
        # Some datasets lack one: VOC2012's test labels were never published, and CIFAR has no validation split. Where
        # nothing is chosen, nothing is validated.
        needed = role in store.splits and not (role == "val" and grid.reports_all)
        if role not in grid.content.get("splits", {}) and not needed:
            roles.pop(role, None)
    for role, names in roles.items():
        errors.extend(
            f"splits.{role}: store {store.path} has no split {name!r}{nearest(name, store.splits)} "
            f"(it has {', '.join(store.splits)})"
            for name in names
            if name not in store.splits
        )
    return roles


def _metric(grid: Grid, store: Store, errors: list[str]) -> str:
    metrics = known_metrics(store.task)
    metric = grid.metric or default_metric(store.task)
    if metric not in metrics:
        errors.append(f"select.metric: {metric!r} does not fit {store.task} labels; use {' or '.join(metrics)}")
    return metric


def _spec(spec: ProbeSpec, group: Group, store: Store, views: dict[str, int], errors: list[str]) -> ProbeSpec | None:
    """Return a spec with the names and numbers of the store, or add an error and return None where it does not fit.

    views: {training split: number of views that the store has}.
    """
    where = group.where("features")
    try:
        features = [store.feature(f) for f in parse_beside(spec.features, store.manifest.aliases)]
    except BadInput as error:
        errors.append(f"{where}: {error.message}")
        return None
    feature, kinds = features[0], [feature.kind for feature in features]
    before, spec = len(errors), replace(spec, features=beside(features))
    read = Input.of(spec)
    width, positions = read.shape(store)
    sizes = [(read.part_shape(str(part), store)[1], part) for part in features]
    assert spec.batch_size is not None, "only imported probes lack one"
    if "tokens" in kinds and not spec.head.reads_tokens:
        feature = features[kinds.index("tokens")]
        layer = feature.layer
        errors.append(f"{where}: only an attentive head reads {feature}; take {layer}:cls, :patch_mean or :spatial")
    elif unlike := next((size for size in sizes if size[0] != positions), None):
        errors.append(
            f"{where}: {feature} has {positions} positions and {unlike[1]} has {unlike[0]}; features side by side have "
            "equally many"
        )
    elif set(kinds) <= {"pooled", "patch_mean"} and not spec.head.pools_first:
        otherwise = "" if spec.head.reads_tokens else ", or say pool: before if that is what you want"
        errors.append(
            f"{where}: a head of type {spec.head.type} on {feature} is another model than on the map; take "
            f"{feature.layer}:spatial{otherwise}"
        )
    elif misfit := spec.head.misfit(features, width, positions, spec.batch_size):
        field, reason = misfit
        errors.append(f"{group.where(field)}: {reason}")
    head = spec.head
    try:
        cells = math.prod(store.manifest.features[str(feature)]["shape"][1:]) if kinds == ["grid"] else 1
        head = head.resolved(len(store.classes), cells)
    except BadInput as error:
        errors.append(f"{group.where('head')}: {error.message}")
    count = _views(spec, group, store, views, errors)
    if len(errors) > before:
        return None
    spec = replace(spec, head=head, views=count)
    if spec.conflict:
        errors.append(f"{group.path}: {spec.conflict}")
        return None
    return spec


def sampled(
    spec: ProbeSpec, folds: int | None, group: Group, sets: TrainingSets, errors: list[str], chosen_on: str | None
) -> ProbeSpec | None:
    """Return a spec whose subset is named by its images, or add an error and return None if none can be drawn."""
    if chosen_on == "train" and spec.sample.partial:
        errors.append(
            f"{group.path}: select.split: train would choose by labels that the probe may not see; choose on val"
        )
    field = next((name for name in ("label_fraction", "shots", "subset") if getattr(spec, name) is not None), None)
    where = field and group.where(field)
    try:
        if spec.subset is not None:
            spec = replace(spec, subset=sets.listed(spec.subset))
        sets[spec.sample]
        where = "select.folds"
        for held_out in spec.with_folds(folds or 0):
            sets[held_out.sample]
    except BadInput as error:
        errors.append(f"{where}: {error.message}")
        return None
    return spec


def _unfit(spec: ProbeSpec, sets: TrainingSets, classes: Sequence[str]) -> str | None:
    """Return why a probe cannot be trained on the labels of its images, or None."""
    solver = spec.optimizer
    return solver.unfit(spec, sets[spec.sample].labels, classes) if isinstance(solver, FullBatchSolver) else None


def _views(spec: ProbeSpec, group: Group, store: Store, views: dict[str, int], errors: list[str]) -> int | None:
    """Return the number of views that a probe trains on, or add an error and return None. views: as for _spec."""
    if spec.views is None and len(set(views.values())) == 1:
        return next(iter(views.values()))
    if spec.views is not None and spec.views <= min(views.values()):
        return spec.views
    available = ", ".join(f"{count} of {name}" for name, count in views.items())
    asked = "all views" if spec.views is None else f"{spec.views} views"
    errors.append(
        f"{group.where('views')}: {asked} asked for, and store {store.path} has {available}; write views: 0 for the images "
        "as they are, or extract with --views"
    )
    return None
