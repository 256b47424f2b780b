"""How many passes through a backbone a grid takes where every probe trains on images instead of cached features."""

import os
from dataclasses import dataclass, replace

import numpy as np

from featcache.datasets.record import Dataset
from featcache.errors import BadInput
from featcache.probes.grids.grid import Grid
from featcache.probes.sample import draw_rows, listed_rows
from featcache.probes.spec import ProbeSpec


@dataclass(frozen=True)
class Forwards:
    """Passes of one image through a backbone, for all probes of a grid on all backbones.

    cached: of featcache, which runs every image once. one_run_each: of code that trains every probe by itself on images,
    as How-to-Probe does. multi_head: of code that trains one head on each of several features in one run, as OpenMixup
    does.
    """

    probes: int
    backbones: int
    cached: int
    one_run_each: int
    multi_head: int


def count_forwards(grid: Grid, data: Dataset, cached: int, backbones: int) -> Forwards:
    """Count the passes of a grid. cached: those of featcache for all backbones.

    How-to-Probe and OpenMixup run the backbone on every training image and on every validation image in each epoch of
    each run; test images that are not the validation images follow once. Their SVMs and kNN, as probes without epochs
    here, read features that are extracted once. k folds are k more runs, in whose epochs each training image is seen
    once, in training or in validation. What halving would stop, or refit would add, is not counted. Raises BadInput for
    a grid that does not fit the dataset.
    """
    roles = _roles(grid, data)
    images = {role: sum(len(data.splits[split]) for split in splits) for role, splits in roles.items()}
    validation = "val" if "val" in images else "test"
    shown = images.get(validation, 0)
    after = images["test"] if "test" in images and set(roles["test"]) != set(roles[validation]) else 0
    folds, once, runs = grid.selection.folds or 0, 0, dict[ProbeSpec, int]()
    sizes: dict[tuple[object, ...], int] = {}
    total = 0
    for spec in grid.specs:
        if spec.epochs is None:
            once = sum(len(data.splits[split]) for split in {s for splits in roles.values() for s in splits})
            continue
        key = (spec.label_fraction, spec.shots, spec.subset, spec.draw)
        if key not in sizes:
            sizes[key] = _training_images(spec, roles["train"], data)
        forwards = spec.epochs * (sizes[key] + shown) + after + folds * spec.epochs * sizes[key]
        total += forwards
        runs[replace(spec, name="", features="pooled")] = forwards
    return Forwards(
        probes=len(grid.specs),
        backbones=backbones,
        cached=cached,
        one_run_each=backbones * (total + once),
        multi_head=backbones * (sum(runs.values()) + once),
    )


def _roles(grid: Grid, data: Dataset) -> dict[str, tuple[str, ...]]:
    """Return {role: splits} for the roles whose splits are extracted. Raises BadInput if train is not."""
    if any(spec.finetune for spec in grid.specs):
        raise BadInput(f"{grid.title}: trains the backbone too, which no store helps: see featcache finetune")
    for split in grid.splits["train"]:
        if split not in data.splits:
            raise BadInput(
                f"{grid.title}: trains on the split {split!r}, and what is extracted is {', '.join(data.splits)}: name it "
                "with --split"
            )
    return {role: splits for role, splits in grid.splits.items() if set(splits) <= data.splits.keys()}


def _training_images(spec: ProbeSpec, splits: tuple[str, ...], data: Dataset) -> int:
    """Return how many images a probe trains on."""
    if not spec.sample.partial:
        return sum(len(data.splits[split]) for split in splits)
    labels = np.concatenate([data.labels(split) for split in splits])
    if spec.subset is not None:
        ids = [record.id for split in splits for record in data.splits[split]]
        return len(listed_rows(os.fspath(spec.subset), ids, labels, data.classes))
    return len(draw_rows(labels, data.classes, spec.label_fraction, spec.shots, spec.draw))
