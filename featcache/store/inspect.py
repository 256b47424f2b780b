"""`featcache inspect`: what a store is a store of, how whole it is, and what its features look like."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from featcache.progress import Progress
from featcache.store.feature_array import FeatureArray
from featcache.store.folder import Folder
from featcache.store.manifest import Manifest
from featcache.store.marker import committed
from featcache.store.reader import Store


@dataclass(frozen=True)
class Statistics:
    """Statistics of all values of a feature in a split.

    zeros: the share of values that are zero. peak: the largest |x| that is finite. not_finite: how many values are not;
    mean, std and peak leave these out.
    """

    mean: float
    std: float
    zeros: float
    peak: float
    not_finite: int


def describe(store: str | os.PathLike[str]) -> tuple[Store, dict[str, tuple[int, int]]]:
    """Open a store, whole or not, and count its shards: (Store, {split or view: (committed, all)})."""
    opened = Store(store)
    return opened, count_shards(opened.folder, opened.parts)


def count_shards(folder: Folder, parts: Sequence[Manifest]) -> dict[str, tuple[int, int]]:
    """Count the shards of some parts of a store: {split or view: (committed, all)}."""
    counts: dict[str, tuple[int, int]] = {}
    for part in parts:
        for split in part.splits:
            done, total = counts.get(split, (0, 0))
            counts[split] = done + len(committed(folder, part, split)), total + part.shards(split)
    return counts


def statistics(array: FeatureArray, progress: Progress | None = None) -> Statistics:
    """Return the Statistics of a feature, which is read once from end to end.

    Means and variances of pieces are merged in float64 (Chan et al. 1979). progress: is told the bytes as they are read.
    """
    import torch

    count, mean, squares, zeros, bad, peak = 0, 0.0, 0.0, 0, 0, 0.0
    for _, rows in array.pieces():
        values = torch.from_numpy(rows).float()
        fine = torch.isfinite(values)
        bad += int(values.numel() - fine.sum())
        values = values[fine] if not fine.all() else values.reshape(-1)
        if values.numel():
            variance, piece_mean = (float(v) for v in torch.var_mean(values.double(), correction=0))
            step, total = piece_mean - mean, count + values.numel()
            squares += variance * values.numel() + step * step * count * values.numel() / total
            mean += step * values.numel() / total
            count = total
            zeros += int((values == 0).sum())
            peak = max(peak, float(values.abs().max()))
        if progress is not None:
            progress.update(rows.nbytes)
    if not count:
        return Statistics(float("nan"), float("nan"), float("nan"), float("nan"), bad)
    return Statistics(mean, (squares / count) ** 0.5, zeros / (count + bad), peak, bad)


def inspect(store: str | os.PathLike[str]) -> dict[str, dict[str, Statistics]]:
    """Return {split: {feature: Statistics}} of a store; splits and views that are not whole are left out.

    featcache.inspect("voc.zarr")["train"]["layer4:pooled"].std
    """
    opened, shards = describe(store)
    whole = [split for split, (done, total) in shards.items() if done == total]
    arrays = [(split, name, opened[split][name]) for split in whole for name in opened.manifest.features]
    result: dict[str, dict[str, Statistics]] = {split: {} for split in whole}
    size = sum(array.nbytes for _, _, array in arrays)
    with Progress("inspect", size, unit="B", fleeting=True) as progress:
        for split, name, array in arrays:
            result[split][name] = statistics(array, progress)
    return result
