"""Parts, folds and refits with every way in which probes learn: mini-batches, full batches, machines, neighbours."""

import numpy as np
import pytest
from digits import CLASSES, digits
from stores import write_features

import featcache
from featcache.probes.runs.run import best, select
from featcache.probes.sample import draw_rows, fold_numbers

pytestmark = pytest.mark.process
LINEAR = {"features": "pooled", "head": "linear", "loss": "ce", "views": 0}
GROUPS = {
    "sgd": LINEAR | {"epochs": 3, "optimizer": {"type": "sgd", "lr": [0.1, 1.0]}},
    "adam": LINEAR | {"loss": "bce", "epochs": 3, "optimizer": {"type": "adam", "lr": [0.01, 0.1]}},
    "lbfgs": LINEAR | {"optimizer": {"type": "lbfgs", "weight_decay": [0.1, 0.001]}},
    "svm": LINEAR | {"loss": "squared_hinge", "optimizer": {"type": "svm", "costs": [0.1, 1.0], "folds": 2}},
    "knn": LINEAR | {"head": {"type": "knn", "k": [1, 3]}, "optimizer": "none"},
}
WAYS = {
    "refit": {"refit": ["train", "val"]},
    "folds": {"select": {"folds": 3}},
}


def splits_of(rows=None, both=False):
    """The digits, with some training images, or with those of train and val together."""
    splits = digits()
    if both:
        one, two = splits["train"], splits["val"]
        splits["train"] = [*one[0], *two[0]], *(np.concatenate([one[k], two[k]]) for k in (1, 2))
    ids, labels, values = splits["train"]
    if rows is not None:
        splits["train"] = [ids[row] for row in rows], labels[rows], values[rows]
    return {name: splits[name] for name in (("train", "test") if both else ("train", "val", "test"))}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of all digits, of 6 shots of train, and of train and val together."""
    place, labels = tmp_path_factory.mktemp("digits"), digits()["train"][1]
    parts = {"all": splits_of(), "shots": splits_of(draw_rows(labels, CLASSES, shots=6)), "both": splits_of(both=True)}
    return {name: write_features(place / f"{name}.zarr", splits, CLASSES) for name, splits in parts.items()}


def on_test(run, probe):
    return [run.row(probe, metric, "test")["value"] for metric in run.metrics]


@pytest.mark.parametrize("kind", GROUPS)
def test_some_shots_are_a_store_of_these(stores, tmp_path, kind):
    run = featcache.train_probes({"probes": [GROUPS[kind] | {"shots": 6}]}, store=stores["all"], run=tmp_path / "r")
    other = featcache.train_probes({"probes": [GROUPS[kind]]}, store=stores["shots"], run=tmp_path / "o")
    for one, two in zip(*(dict.fromkeys(row["probe"] for row in r.scores) for r in (run, other)), strict=True):
        assert on_test(run, one) == pytest.approx(on_test(other, two), abs=1e-6)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_refit_is_a_probe_of_both_splits(stores, tmp_path, kind):
    run = featcache.train_probes(WAYS["refit"] | {"probes": [GROUPS[kind]]}, store=stores["all"], run=tmp_path / "r")
    plain = {"select": {"split": "none"}, "probes": [GROUPS[kind]]}
    other = featcache.train_probes(plain, store=stores["both"], run=tmp_path / "o")
    (refit,) = select(run, "best top1")
    assert on_test(run, refit) == pytest.approx(on_test(other, run.sources[refit]), abs=1e-6)
    assert run.row(refit, "top1", "val")["value"] is None and best(run) == [refit]


@pytest.mark.parametrize("kind", GROUPS)
def test_folds_are_stores_without_a_part(stores, tmp_path, kind):
    labels = digits()["train"][1]
    run = featcache.train_probes(WAYS["folds"] | {"probes": [GROUPS[kind]]}, store=stores["all"], run=tmp_path / "r")
    numbers, scores = fold_numbers(labels, CLASSES, 3), {}
    for fold in range(3):
        splits = splits_of(np.flatnonzero(numbers != fold))
        ids, own, values = digits()["train"]
        held = np.flatnonzero(numbers == fold)
        splits["val"] = [ids[row] for row in held], own[held], values[held]
        store = write_features(tmp_path / f"{fold}.zarr", splits, CLASSES)
        other = featcache.train_probes({"probes": [GROUPS[kind]]}, store=store, run=tmp_path / str(fold))
        for row in other.scores:
            if row["split"] == "val":
                scores.setdefault((row["probe"], row["metric"]), []).append(row["value"])
    for (probe, metric), values in scores.items():
        assert run.row(probe, metric, "folds")["value"] == pytest.approx(np.mean(values), abs=1e-6), metric
    (chosen,) = select(run, "best top1")
    whole = featcache.train_probes({"probes": [GROUPS[kind]]}, store=stores["all"], run=tmp_path / "w")
    # The exact solver trains folds and the whole side by side, which moves the last digits.
    assert on_test(run, chosen) == pytest.approx(on_test(whole, chosen), abs=1e-6)
