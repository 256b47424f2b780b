"""`featcache inspect`: what a store is a store of, how whole it is, and what its features look like."""

from dataclasses import dataclass

from tqdm import tqdm

from featcache.store.marker import committed
from featcache.store.reader import Store


@dataclass(frozen=True)
class Statistics:
    """Of all values of a feature in a split. zeros: their share. peak: largest |x| that is finite."""

    mean: float
    std: float
    zeros: float
    peak: float
    not_finite: int


def describe(store):
    """Open a store, whole or not, and count its shards: (Store, {split or view: (committed, all)})."""
    opened = Store(store)
    manifest = opened.manifest
    return opened, {s: (len(committed(opened.folder, manifest, s)), manifest.shards(s)) for s in manifest.splits}


def statistics(array, progress=None):
    """Statistics of a FeatureArray, read once from end to end. Sums are in float64 (Chan et al. 1979)."""
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


def inspect(store):
    """Return {split: {feature: Statistics}} of a store's features; splits and views that are not whole are left out."""
    opened, shards = describe(store)
    whole = [split for split, (there, total) in shards.items() if there == total]
    arrays = [(split, name, opened[split][name]) for split in whole for name in opened.manifest.features]
    result = {split: {} for split in whole}
    total = sum(array.nbytes for _, _, array in arrays)
    with tqdm(total=total, unit="B", unit_scale=True, desc="inspect", leave=False) as progress:
        for split, name, array in arrays:
            result[split][name] = statistics(array, progress)
    return result
