"""A recipe on a dataset and a backbone: its specs with the names and numbers of these, or errors where they do not fit."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from featcache.backbones.backbone import Backbone
from featcache.datasets import read_dataset
from featcache.datasets.record import Dataset
from featcache.errors import BadInput, nearest
from featcache.extraction.images import check_decoder
from featcache.feature import beside, parse_beside
from featcache.finetuning.network import Source, batch_norms
from featcache.finetuning.settings import Settings
from featcache.probes.grids.grid import Grid, load_grid, refuse
from featcache.probes.grids.grid_file import Group
from featcache.probes.grids.selection import NOTHING
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.resolve import sampled, undecided
from featcache.probes.runs.key import RunBasis
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import Run, best, open_run, select
from featcache.probes.runs.tuned import is_tuned
from featcache.probes.scores.metrics import default_metric, metrics_of
from featcache.probes.spec import ProbeSpec
from featcache.probes.train import chosen_split
from featcache.probes.trained import TrainedProbe
from featcache.probes.tuning import Full
from featcache.store.reader import Store


@dataclass(frozen=True)
class Configurations:
    """What is trained. specs: resolved. splits: {role: splits of the dataset}. See probes.resolve.Resolved."""

    specs: list[ProbeSpec]
    splits: dict[str, tuple[str, ...]]
    metric: str
    chosen_on: str | None
    sets: TrainingSets

    @property
    def scored(self) -> list[str]:
        """The roles that are scored. The training images are only if nothing else is to choose on."""
        return [role for role in self.splits if role != "train" or self.chosen_on == "train"]


class Records:
    """The classes of a dataset, and the ids and labels of its splits, as one asks a store for them."""

    def __init__(self, data: Dataset):
        self.data, self.classes = data, data.classes

    def __getitem__(self, split: str) -> "RecordsOfSplit":
        return RecordsOfSplit([record.id for record in self.data.splits[split]], self.data.labels(split))


@dataclass(frozen=True)
class RecordsOfSplit:
    """Ids and labels of one split."""

    ids: list[str]
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """A recipe ready to be trained. start: the probe whose weights the heads start from, or None. See probes.train.Task."""

    grid: Grid
    data: Dataset
    source: Source
    backbone: Backbone
    resolved: Configurations
    content: dict[str, Any]
    basis: RunBasis
    key: str
    start: TrainedProbe | None

    def labels(self, role: str) -> Tensor:
        """Return the labels of a role: int8 [N, C] if multi-label, int64 [N] if single-label."""
        return torch.from_numpy(np.concatenate([self.data.labels(name) for name in self.resolved.splits[role]]))


def prepare(settings: Settings) -> Task:
    """Read recipe, dataset and backbone, and fit them to each other. Raises BadInput that names all that does not fit."""
    grid = load_grid(settings.recipe, settings.parity)
    _check_groups(grid)
    data = _read(grid, settings.dataset, settings.root)
    backbone, _ = settings.source.load(data)
    check_decoder("exact", backbone.preprocessing)
    start = None
    if settings.head_from is not None:
        start = _start(open_run(settings.head_from), settings.select, data, backbone)
    elif settings.select is not None:
        raise BadInput("--select chooses the probe of --head-from, the run that the heads start from; name it too")
    resolved = _resolve(grid, data, backbone, start)
    content = grid.content | {
        "splits": {role: list(names) for role, names in resolved.splits.items()},
        "select": {"metric": resolved.metric} | chosen_split(grid, resolved.chosen_on),
    }
    selected = {key: value for key, value in content["select"].items() if value != NOTHING}
    fingerprints = {name: data.fingerprint(name) for names in resolved.splits.values() for name in names}
    facts = {
        "arch": backbone.arch, "weights_sha256": backbone.weights_sha256,
        "preprocessing": backbone.preprocessing.describe(), "augmentation": asdict(data.augmentation),
        "dataset": {"name": data.name, "splits": fingerprints},
    }  # fmt: skip
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    basis = RunBasis(identity, settings.seed, content["splits"], selected, None, grid.parity)
    groups = [content["probes"], *([start.spec.id] if start else [])]
    key = basis.key(groups, grid.rules)
    return Task(grid, data, settings.source, backbone, resolved, content, basis, key, start)


def _check_groups(grid: Grid) -> None:
    errors = [
        f"{group.path}: has no finetune section; write finetune: {{type: full}}, or run train-probes on a store"
        for spec, group in zip(grid.specs, grid.groups, strict=True)
        if not isinstance(spec.finetune, Full)
    ]
    if grid.search:
        errors.append("search: compares probes of one pass over a store, and fine-tuning has none; leave it out")
    if grid.store:
        errors.append("store: fine-tuning reads images; leave it out")
    errors += [f"{key}: is for probes on a store; leave it out" for key in ("refit", "folds") if key in grid.content]
    refuse(grid.title, errors)


def _read(grid: Grid, dataset: str, root: str | os.PathLike[str] | None) -> Dataset:
    """Read the splits of a dataset that the recipe names, or else all that its protocol needs. Raises BadInput."""
    named = grid.content.get("splits", {})
    asked = list(dict.fromkeys(name for role in named for name in grid.splits[role])) if named else None
    data = read_dataset(dataset, root, asked)
    for split, records in data.splits.items():
        if not data.classes or any(record.labels is None for record in records):
            raise BadInput(f"dataset {dataset}: split {split} has no labels, and fine-tuning needs them")
    return data


def _resolve(grid: Grid, data: Dataset, backbone: Backbone, start: TrainedProbe | None) -> Configurations:
    errors: list[str] = []
    splits = dict(grid.splits)
    for role in ("val", "test"):
        if role not in grid.content.get("splits", {}) and splits.get(role) not in [(name,) for name in data.splits]:
            splits.pop(role, None)
    errors += [
        f"splits.{role}: dataset {data.name} has no split {name!r}{nearest(name, data.splits)} (it has {', '.join(data.splits)})"
        for role, names in splits.items()
        for name in names
        if name not in data.splits
    ]
    metric = grid.metric or default_metric(data.task)
    if metric not in metrics_of(data.task):
        errors.append(
            f"select.metric: {metric!r} does not fit {data.task} labels; use {' or '.join(metrics_of(data.task))}"
        )
    if grid.selection.folds:
        errors.append("select.folds: is for probes on a store; choose on val")
    chosen_on = None if grid.reports_all else grid.chosen_on or ("val" if "val" in splits else None)
    if not splits.keys() & {chosen_on, "test"}:
        errors.append(
            f"splits: no images to score on: name val or test (dataset {data.name} has {', '.join(data.splits)})"
        )
    refuse(grid.title, errors)
    # It reads nothing of a store but classes, ids and labels.
    specs, sets = [], TrainingSets(cast(Store, Records(data)), splits, torch.device("cpu"))
    for spec, group in zip(grid.specs, grid.groups, strict=True):
        resolved = _spec(spec, group, data, backbone, start, chosen_on, errors)
        if resolved := resolved and sampled(resolved, None, group, sets, errors, chosen_on):
            specs.append(resolved)
    if chosen_on is None and not errors and not grid.reports_all and (reason := undecided(specs, folds=False)):
        errors.append(f"probes: {reason}")
    refuse(grid.title, errors)
    return Configurations(specs, splits, metric, chosen_on, sets)


def _spec(
    spec: ProbeSpec,
    group: Group,
    data: Dataset,
    backbone: Backbone,
    start: TrainedProbe | None,
    chosen_on: str | None,
    errors: list[str],
) -> ProbeSpec | None:
    """Return a spec with the names and numbers of the dataset and the backbone, or add errors and return None."""
    before = len(errors)
    for field, asked in (("keep", spec.keep == "best"), ("patience", spec.patience > 0)):
        if asked and chosen_on is None:
            errors.append(f"{group.where(field)}: looks at scores of a split to choose on, and the recipe has none")
    try:
        features = parse_beside(spec.features, backbone.aliases, backbone.layers)
    except BadInput as error:
        errors.append(f"{group.where('features')}: {error.message}")
        return None
    try:
        head = spec.head.resolved(len(data.classes))
    except BadInput as error:
        errors.append(f"{group.where('head')}: {error.message}")
        return None
    for feature in features:
        if feature.kind == "tokens" and not head.reads_tokens:
            errors.append(f"{group.where('features')}: only an attentive head reads {feature}; take cls or patch_mean")
        elif feature.kind in ("pooled", "patch_mean") and not head.pools_first:
            errors.append(
                f"{group.where('features')}: a head of type {head.type} reads a map; take {feature.layer}:spatial"
            )
    tuning = spec.finetune
    assert isinstance(tuning, Full), "checked before"
    smallest = min(spec.batch_size or 1, tuning.micro_batch or spec.batch_size or 1)
    if smallest < 2 and tuning.norm != "eval" and batch_norms(backbone.trunk):
        field = "finetune" if tuning.micro_batch == 1 else "batch_size"
        errors.append(
            f"{group.where(field)}: one image at a time has no variance for batch norms to divide by; take 2 or more, or "
            "say norm: eval"
        )
    if tuning.repeats > (spec.batch_size or 1):
        errors.append(
            f"{group.where('finetune')}: repeats: {tuning.repeats} copies of an image do not fit into batches of "
            f"{spec.batch_size}"
        )
    source = None
    if start is not None:
        source = hashlib.sha256(safetensors.torch.save(start.weights)).hexdigest()
        if (beside(features), head) != (start.spec.features, start.spec.head):
            errors.append(
                f"{group.where('head')}: {head.type} on {beside(features)}, and the probe of --head-from, {start.spec.id}, is "
                f"{start.spec.head.type} on {start.spec.features}; write the same features and head"
            )
    if len(errors) > before:
        return None
    return replace(spec, features=beside(features), head=head, views=0, source=source)


def _start(run: Run, rule: str | None, data: Dataset, backbone: Backbone) -> TrainedProbe:
    """Return the probe of a run that heads start from. Raises BadInput if it does not fit."""
    where, summary = f"--head-from {run.path}", run.summary
    if summary.get("dataset") != data.name:
        raise BadInput(f"{where}: its probes are of dataset {summary.get('dataset')}, not {data.name}")
    if summary["classes"] != list(data.classes):
        count = len(summary["classes"])
        raise BadInput(
            f"{where}: its heads are for {count} classes, which are not the {len(data.classes)} of {data.name}"
        )
    chosen: Sequence[str] = select(run, rule) if rule else best(run)
    if len(chosen) != 1:
        raise BadInput(f"{where}: {len(chosen)} probes are chosen; choose one, as in --select 'best {run.metric}'")
    # Each probe of a fine-tuned run has a backbone of its own.
    own = summary["backbones"].get(chosen[0]) if is_tuned(summary) else summary.get("weights_sha256")
    if own != backbone.weights_sha256:
        raise BadInput(
            f"{where}: probe {chosen[0]} is of another backbone (weights sha256 {own}) than {backbone.arch}, weights "
            f"sha256 {backbone.weights_sha256}"
        )
    return load_probe(run.path, chosen[0])
