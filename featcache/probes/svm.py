"""`featcache svm`: linear support vector machines on a store's features, as a grid that train-probes trains."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

from featcache.arguments import FLAG, NAME, PATH, takes, whole
from featcache.errors import BadInput, nearest, shown
from featcache.feature import parse_features
from featcache.probes.grids.grid import parse_grid
from featcache.probes.runs.run import Run
from featcache.probes.scores.metrics import default_metric
from featcache.probes.scores.metrics.interpolated_average_precision import EnvelopeAveragePrecision
from featcache.probes.solvers.svm import COSTS
from featcache.probes.train import train_grid
from featcache.store.manifest import feature_of
from featcache.store.reader import Store, open_store

# The protocol that MMSelfSup and OpenMixup have from VISSL (Goyal et al., ICCV 2019).
PARITY = "openmixup"
SHOTS, SAMPLES, NEGATIVES = (1, 2, 4, 8, 16, 32, 64, 96), 5, 19
# Reductions that are one vector for each image.
VECTORS = ("pooled", "patch_mean", "cls", "grid")


@takes(
    store=PATH, low_shot=FLAG, parity=NAME, metric=NAME, engine=NAME, run=PATH, samples=whole(1, 1000), seed=whole(0)
)
def svm(
    store: str | PathLike[str],
    features: str | Sequence[str] | None = None,
    low_shot: bool = False,
    shots: Sequence[int] = SHOTS,
    samples: int = SAMPLES,
    costs: Literal["voc07", "vissl"] | Sequence[float] = "voc07",
    folds: int = 3,
    metric: str | None = None,
    engine: str = "newton",
    parity: str | None = None,
    train: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    run: str | PathLike[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    memory: float | None = None,
) -> Run | None:
    """Train a support vector machine for each class on each of several features, score them, and write a run folder.

    features: names, by default all features of the store that are one vector for each image. low_shot: train on a few
    images of each class, `shots` positives and 19 times as many negatives, drawn `samples` times with the seeds `seed`,
    `seed` + 1, ... costs, folds, engine: fields of the optimizer svm (docs/grid.md). metric: that is reported, by
    default map_voc10, or top1 on single-label data. parity: openmixup, the published protocol with its quirks. train,
    test: splits of the store, by default VOC's trainval and test. run: folder, by default runs/svm-<id> or
    runs/low-shot-svm-<id>. The others are those of train_probes, and so are the result and the errors. The grid is in the
    run folder.

        run = featcache.svm("features/voc2007-resnet50-1a2b3c4d.zarr", features="feat5:grid(6,1,0)")
    """
    opened = open_store(store)
    grid = svm_grid(opened, features, low_shot, shots, samples, costs, folds, metric, engine, parity, train, test, seed)
    stem = "low-shot-svm" if low_shot else "svm"
    return train_grid(parse_grid(grid, title=stem), stem, store, run, device, memory=memory)


def svm_grid(
    store: Store,
    features: str | Sequence[str] | None,
    low_shot: bool,
    shots: Sequence[int],
    samples: int,
    costs: str | Sequence[float],
    folds: int,
    metric: str | None,
    engine: str,
    parity: str | None,
    train: str | Sequence[str] | None,
    test: str | Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return the grid that svm() trains. The arguments are svm()'s. Raises BadInput.

    By default costs are cross-validated, for each class, and labels of difficult objects are left out. Parity trains on
    them as negatives; with few shots, whose draws have none, it chooses one cost for all classes on the test images,
    and so trains a probe for each cost.
    """
    if parity not in (None, PARITY):
        raise BadInput(f"--parity {parity}: svm has only {PARITY}{nearest(parity, [PARITY])}")
    numbers, on_test = cost_list(costs), low_shot and parity is not None
    grid: dict[str, Any] = {
        "splits": _splits(store, train, test),
        "select": {"metric": metric or default_average(store.task)},
    }
    solver: dict[str, Any] = {
        "type": "svm",
        "costs": costs if isinstance(costs, str) else list(costs),
        "engine": engine,
    }
    if low_shot:
        solver |= {"positives": _shots(shots), "negatives": NEGATIVES}
    if on_test:
        solver["costs"] = [[cost] for cost in numbers]
        grid["splits"]["val"] = grid["splits"]["test"]
        grid |= {"parity": PARITY, "profiles": {PARITY: {"splits": {"val": grid["splits"]["test"]}}}}
        grid["select"]["split"] = "val"
    else:
        solver["folds"] = folds
        grid["select"]["split"] = "none"
    difficult = "negative" if parity and not low_shot else "ignored"
    group = {
        "name": "low-shot svm" if low_shot else "svm",
        "features": _features(store, features),
        "head": {"type": "linear", "norm": "l2", "pool": "before"},
        "loss": {"type": "squared_hinge", "positive_weight": 2.0, "difficult": difficult},
        "optimizer": solver,
        "views": 0,
        "seed": [seed + sample for sample in range(samples)] if low_shot else seed,
    }
    return grid | {"probes": [group]}


def default_average(task: str) -> str:
    """Return the metric that is reported by default: VISSL's, or the usual one on data that it cannot score."""
    kind = EnvelopeAveragePrecision
    return kind.word() if task in kind.tasks else default_metric(task)


def _splits(store: Store, train: str | Sequence[str] | None, test: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Return the splits to train and to test on: the ones given, or trainval (or train and val) and test."""
    scored = _names(test) if test else ["test"] if "test" in store.splits else ["val"]
    if train:
        return {"train": _names(train), "test": scored}
    if "trainval" in store.splits:
        return {"train": ["trainval"], "test": scored}
    own = [name for name in store.splits if name in ("train", "val") and name not in scored]
    return {"train": own or ["train"], "test": scored}


def cost_list(costs: str | Sequence[float]) -> list[float]:
    """Return costs, which may be the name of a list, as numbers. Raises BadInput for an unknown name."""
    if not isinstance(costs, str):
        return list(costs)
    if costs not in COSTS:
        raise BadInput(f"--costs {costs}: expected {', '.join(COSTS)}, or numbers{nearest(costs, COSTS)}")
    return list(COSTS[costs])


def _names(value: str | Sequence[str]) -> list[str]:
    return value.split(",") if isinstance(value, str) else list(value)


def _shots(shots: Sequence[int]) -> list[int]:
    whole_numbers = all(isinstance(shot, int) and not isinstance(shot, bool) and shot >= 1 for shot in shots)
    if not shots or not whole_numbers or len(set(shots)) < len(shots):
        raise BadInput(f"--shots: expected whole numbers of at least 1, each once, not {shown(shots)}")
    return list(shots)


def _features(store: Store, features: str | Sequence[str] | None) -> list[str]:
    """Return the features to train on by their names in the store. Raises BadInput for those that it lacks."""
    if features is None:
        held = list(store.manifest.features)
        vectors = [name for name in held if feature_of(name).kind in VECTORS]
        return vectors or [name for name in held if feature_of(name).kind == "spatial"]
    return [str(store.manifest.feature(str(feature))) for feature in parse_features(features, store.manifest.aliases)]
