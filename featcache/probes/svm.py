"""`featcache svm`: linear support vector machines on a store's features, as a grid that train-probes trains."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `svm` was asked for. Its docstring says what each field means."""

    features: str | Sequence[str] | None = None
    low_shot: bool = False
    shots: Sequence[int] = SHOTS
    samples: int = SAMPLES
    costs: str | Sequence[float] = "voc07"
    folds: int = 3
    metric: str | None = None
    engine: str = "newton"
    parity: str | None = None
    train: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    seed: int = 0


@takes(
    store=PATH,
    low_shot=FLAG,
    allow_overlap=FLAG,
    parity=NAME,
    metric=NAME,
    engine=NAME,
    run=PATH,
    samples=whole(1, 1000),
    seed=whole(0),
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
    allow_overlap: bool = False,
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
    asked = Settings(
        features=features, low_shot=low_shot, shots=shots, samples=samples, costs=costs, folds=folds, metric=metric,
        engine=engine, parity=parity, train=train, test=test, seed=seed,
    )  # fmt: skip
    grid = svm_grid(open_store(store), asked)
    stem = "low-shot-svm" if low_shot else "svm"
    loaded = parse_grid(grid, title=stem)
    return train_grid(loaded, stem, store, run, device, memory=memory, allow_overlap=allow_overlap)


def svm_grid(store: Store, asked: Settings) -> dict[str, Any]:
    """Return the grid that svm() trains. Raises BadInput.

    By default costs are cross-validated, for each class, and labels of difficult objects are left out. Parity trains on
    them as negatives; with few shots, whose draws have none, it chooses one cost for all classes on the test images,
    and so trains a probe for each cost.
    """
    if asked.parity not in (None, PARITY):
        raise BadInput(f"--parity {asked.parity}: svm has only {PARITY}{nearest(asked.parity, [PARITY])}")
    costs, on_test = asked.costs, asked.low_shot and asked.parity is not None
    numbers = cost_list(costs)
    grid: dict[str, Any] = {
        "splits": _splits(store, asked.train, asked.test),
        "select": {"metric": asked.metric or default_average(store.task)},
    }
    solver: dict[str, Any] = {
        "type": "svm",
        "costs": costs if isinstance(costs, str) else list(costs),
        "engine": asked.engine,
    }
    if asked.low_shot:
        solver |= {"positives": _shots(asked.shots), "negatives": NEGATIVES}
    if on_test:
        solver["costs"] = [[cost] for cost in numbers]
        grid["splits"]["val"] = grid["splits"]["test"]
        grid |= {"parity": PARITY, "profiles": {PARITY: {"splits": {"val": grid["splits"]["test"]}}}}
        grid["select"]["split"] = "val"
    else:
        solver["folds"] = asked.folds
        grid["select"]["split"] = "none"
    difficult = "negative" if asked.parity and not asked.low_shot else "ignored"
    group = {
        "name": "low-shot svm" if asked.low_shot else "svm",
        "features": _features(store, asked.features),
        "head": {"type": "linear", "norm": "l2", "pool": "before"},
        "loss": {"type": "squared_hinge", "positive_weight": 2.0, "difficult": difficult},
        "optimizer": solver,
        "views": 0,
        "seed": [asked.seed + sample for sample in range(asked.samples)] if asked.low_shot else asked.seed,
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
    return [str(store.feature(str(feature))) for feature in parse_features(features, store.manifest.aliases)]
