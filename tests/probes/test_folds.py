"""select: {folds: K}: where there is no split to choose on, recipes are scored on the folds of train that they left out."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import yaml
from digits import CLASSES, digits, several
from sklearn.linear_model import LogisticRegression
from stores import write_features

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.probe_file import find_probes, load_probe, load_probes, load_specs
from featcache.probes.runs.run import best, select
from featcache.probes.sample import draw_rows, fold_numbers

pytestmark = pytest.mark.process

LOGISTIC = {
    "name": "logistic", "features": "pooled", "head": "linear", "loss": "ce",
    "optimizer": {"type": "lbfgs", "weight_decay": [1.0, 0.01, 0.001]},
}  # fmt: skip
SGD = {
    "name": "sgd", "features": "pooled", "head": "linear", "loss": "bce", "epochs": 5, "batch_size": 32,
    "optimizer": {"type": "sgd", "lr": 0.3},
}  # fmt: skip
GRID = {"select": {"folds": 4}, "probes": [LOGISTIC, SGD]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of digits without a val split."""
    splits = {name: part for name, part in digits().items() if name != "val"}
    return write_features(tmp_path_factory.mktemp("digits") / "s.zarr", splits, CLASSES)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run of GRID."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def test_scores_on_folds_are_those_of_scikit_learn(run):
    """A mean over the folds of the accuracy on what each fold holds out."""
    _, labels, values = digits()["train"]
    folds = fold_numbers(labels, CLASSES, 4)
    for row in (r for r in run.scores if r["split"] == "folds" and r["metric"] == "top1"):
        if row["optimizer.type"] != "lbfgs":
            continue
        scores = []
        for fold in range(4):
            there = folds != fold
            model = LogisticRegression(
                C=1 / (there.sum() * float(row["optimizer.weight_decay"])), tol=1e-8, max_iter=5000
            )
            scores.append(model.fit(values[there], labels[there]).score(values[~there], labels[~there]))
        assert row["value"] == pytest.approx(np.mean(scores), abs=0.003)
        assert row["low"] < row["value"] < row["high"]
        # The interval is about that of as many images.
        share = row["value"]
        width = 2 * 1.96 * np.sqrt(share * (1 - share) / len(labels))
        assert 0.9 < (row["high"] - row["low"]) / width < 1.15


def test_each_recipe_is_also_trained_on_all_of_train(run, store, tmp_path):
    plain = featcache.train_probes(
        {"select": {"split": "train"}, "probes": [LOGISTIC, SGD]}, store=store, run=tmp_path / "r"
    )
    ids = {row["probe"] for row in run.scores}
    assert ids == {row["probe"] for row in plain.scores} and len(ids) == 4
    for probe in ids:
        assert run.row(probe, "top1", "test")["value"] == plain.row(probe, "top1", "test")["value"]
    specs = list(load_specs(run.path, find_probes(run.path)))
    assert len(specs) == 20 and run.summary["probes"] == 4 and run.summary["fold_probes"] == 16


def test_the_best_by_folds_is_chosen(run, store, command, tmp_path):
    scores = {r["probe"]: r["value"] for r in run.scores if r["split"] == "folds" and r["metric"] == "top1"}
    assert select(run, "best top1") == [max(scores, key=scores.get)]
    assert run.chosen_on == "folds" and len(best(run, "loss")) == 2 and run.caution is None
    code, out, err = command("train-probes", "--grid", run.path / "grid.yaml", "--run", run.path)
    assert code == 0 and "is finished already" in err and "best 4 of 4 probes by folds top-1" in out
    assert "folds top-1 %" in out.splitlines()[0]
    code, out, _ = command("compare", "--run", run.path, "--store", store, "--select", "best top1 per loss")
    assert code == 0 and out.startswith("on test")
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0 and "chosen by folds top-1" in (tmp_path / "page.html").read_text(), err
    code, out, _ = command("verify", run.path)
    assert code == 0 and "is whole" in out
    for name in ("calibration.csv", "history.csv", "seeds.csv"):
        with open(run.path / name, newline="") as file:
            assert len(list(csv.DictReader(file))) > 4


def test_a_recipe_does_not_depend_on_the_others(run, store, tmp_path):
    alone = featcache.train_probes(GRID | {"probes": [SGD]}, store=store, run=tmp_path / "r")
    for row in alone.scores:
        assert row["value"] == run.row(row["probe"], row["metric"], row["split"])["value"]
        assert row["low"] == run.row(row["probe"], row["metric"], row["split"])["low"]


def test_folds_of_exact_probes_train_together(run):
    files = {
        find_probes(run.path)[spec.id].path
        for spec in load_specs(run.path, find_probes(run.path))
        if spec.optimizer.type == "lbfgs"
    }
    assert len(files) == 1, "one block, in which the folds are beside the probes of all images"


@pytest.mark.parametrize("labels", ["single", "several"])
def test_an_exact_fold_is_the_probe_of_a_store_without_it(labels, tmp_path):
    """Whatever depends on the labels that are left: weights of classes, the mean, difficult labels."""
    splits = {name: part for name, part in digits().items() if name != "val"}
    names = CLASSES
    if labels == "several":
        splits = {name: (ids, several(own), values) for name, (ids, own, values) in splits.items()}
        splits["train"][1][::7, 3] = -1
        names = [*CLASSES, "even"]
    losses = [{"type": "ce", "class_weights": "balanced"}, {"type": "ce", "label_smoothing": 0.1},
              {"type": "bce", "class_weights": "balanced"}, "squared_hinge"]  # fmt: skip
    group = LOGISTIC | {"loss": losses, "optimizer": {"type": "lbfgs", "weight_decay": [0.1, 1e-5]}}
    store = write_features(tmp_path / "s.zarr", splits, names)
    run = featcache.train_probes({"select": {"folds": 3}, "probes": [group]}, store=store, run=tmp_path / "r")
    ids, own, values = splits["train"]
    learned = fold_numbers(own, names, 3) != 1
    splits["train"] = list(np.array(ids)[learned]), own[learned], values[learned]
    part = write_features(tmp_path / "part.zarr", splits, names)
    other = featcache.train_probes({"select": {"split": "train"}, "probes": [group]}, store=part, run=tmp_path / "o")
    folds = [spec for spec in load_specs(run.path, find_probes(run.path)) if spec.fold == "2/3"]
    assert len(folds) == 8
    for spec in folds:
        own, alone = (load_probe(p.path, s.id) for p, s in ((run, spec), (other, replace(spec, fold=None))))
        assert own.stopped is None and own.optimality.distance <= 1e-5
        gap = (own.weights["fc0.weight"] - alone.weights["fc0.weight"]).norm()
        assert gap < 2.2e-5 * alone.weights["fc0.weight"].norm()
        bias = (own.weights["fc0.bias"] - alone.weights["fc0.bias"]).norm()
        assert bias < 1e-4 * max(1, alone.weights["fc0.bias"].norm())


def test_what_ends_short_says_so(store, command, tmp_path):
    """While it trains, in run.json, and beside the table whenever that is printed, of a fold by its recipe."""
    group = LOGISTIC | {"optimizer": {"type": "lbfgs", "weight_decay": [10.0, 1e-4], "iterations": 2}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"select": {"folds": 2}, "probes": [group]}))
    words = ["train-probes", "--grid", tmp_path / "g.yaml", "--store", store, "--run", tmp_path / "r"]
    code, out, err = command(*words)
    run = featcache.open_run(tmp_path / "r")
    probes = list(load_probes(run.path, find_probes(run.path)))
    short = [probe.spec for probe in probes if probe.stopped]
    assert code == 0 and any(spec.fold for spec in short) and any(not spec.fold for spec in short)
    for spec in short:
        which = f" (without fold {spec.fold})" if spec.fold else ""
        assert f"warning: probe {spec.id}{which} had not converged after 2 Newton steps" in err
    assert set(run.summary["short"]) == {replace(spec, fold=None).id for spec in short}
    for text in (out, command(*words)[1]):
        assert f"short of their optimum, or with a fold that is: {run.summary['short'][0]}" in text


def test_several_grids_in_one_run_keep_their_folds(run, store, tmp_path):
    featcache.train_probes(GRID | {"probes": [LOGISTIC]}, store=store, run=tmp_path / "r")
    both = featcache.train_probes(GRID | {"probes": [SGD]}, store=store, run=tmp_path / "r")
    for row in run.scores:
        again = both.row(row["probe"], row["metric"], row["split"])
        assert [again[k] for k in ("value", "low", "high")] == [row[k] for k in ("value", "low", "high")]
    assert featcache.verify(both.path) == [] and both.summary["fold_probes"] == 16
    with pytest.raises(BadInput, match="was made with select .*; choose another --run"):
        featcache.train_probes(GRID | {"select": {"folds": 3}}, store=store, run=tmp_path / "r")


def test_what_is_deleted_is_made_again(run, store, tmp_path):
    again = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    fold = next(spec for spec in load_specs(again.path, find_probes(again.path)) if spec.fold)
    find_probes(again.path)[fold.id].path.unlink()
    assert [finding.where for finding in featcache.verify(again.path)] == ["probes"]
    again = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    assert (again.path / "scores.csv").read_bytes() == (run.path / "scores.csv").read_bytes()


def test_folds_of_some_shots_are_within_them(store, tmp_path):
    labels = digits()["train"][1]
    grid = GRID | {"probes": [SGD | {"shots": 8, "draw": [0, 1]}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    specs = [spec for spec in load_specs(run.path, find_probes(run.path)) if spec.fold]
    assert len(specs) == 8 and len({r["probe"] for r in run.scores}) == 2
    rows = draw_rows(labels, CLASSES, shots=8)
    folds = fold_numbers(labels[rows], CLASSES, 4)
    splits = digits()
    ids, _, values = splits["train"]
    part = rows[folds != 1]
    splits["train"] = [ids[row] for row in part], labels[part], values[part]
    alone = write_features(tmp_path / "part.zarr", splits, CLASSES)
    other = featcache.train_probes({"probes": [SGD]}, store=alone, run=tmp_path / "o")
    (spec,) = [spec for spec in specs if spec.fold == "2/4" and spec.draw == 0]
    expected = load_probe(other.path, other.scores[0]["probe"]).weights
    assert all((load_probe(run.path, spec.id).weights[name] == weights).all() for name, weights in expected.items())


def test_several_labels(tmp_path):
    splits = {split: (ids, several(labels), values) for split, (ids, labels, values) in digits().items()}
    store = write_features(tmp_path / "s.zarr", splits, [*CLASSES, "even"])
    run = featcache.train_probes(GRID | {"probes": [SGD]}, store=store, run=tmp_path / "r")
    for metric in run.metrics:
        row = run.row(run.scores[0]["probe"], metric, "folds")
        assert row["low"] <= row["value"] <= row["high"]
    on_val, on_folds = (run.row(run.scores[0]["probe"], "map", role)["value"] for role in ("val", "folds"))
    assert abs(on_val - on_folds) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": {"folds": 1}}, "select.folds: 1 is not a whole number from 2 to 100"),
        ({"select": {"folds": True}}, "select.folds: True is not a whole number from 2 to 100"),
        ({"select": {"folds": 4, "split": "train"}}, "select: give split or folds, not both"),
        ({"select": {"folds": 90}}, "select.folds: class "),
        ({"probes": [SGD | {"shots": 2}]}, "select.folds: class 'digit 0' has 2 images, and each of 4 folds needs one"),
        ({"probes": [SGD | {"keep": "best"}]}, "probes[0].keep: looks at scores of a split to choose on, and the grid chooses"),
        ({"probes": [SGD | {"patience": 2}]}, "probes[0].patience: looks at scores of a split"),
        ({"search": "halving", "probes": [SGD]}, "search: halving looks at scores of a split to choose on"),
    ],
)  # fmt: skip
def test_what_is_refused(store, tmp_path, change, message):
    with pytest.raises(BadInput) as caught:
        featcache.train_probes(GRID | change, store=store, run=tmp_path / "r")
    assert message in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "r").exists()


def test_what_is_chosen_by_folds_is_scored_on_test(tmp_path):
    store = write_features(tmp_path / "s.zarr", {"train": digits()["train"]}, CLASSES)
    with pytest.raises(BadInput, match="select.folds: what is chosen by folds is scored on test, and store"):
        featcache.train_probes(GRID, store=store, run=tmp_path / "r")


def test_a_dry_run_counts_the_folds(store, command, tmp_path):
    plan = featcache.plan_probes(GRID, store)
    assert sum(stack.probes for stack in plan.stacks) == 20 and plan.probes == 4


def test_a_list_of_another_grid_is_read_again_for_its_folds(store, tmp_path):
    ids = featcache.open_store(store)["train"].ids
    (tmp_path / "list.txt").write_text("\n".join(ids[:300]))
    first = featcache.train_probes(
        GRID | {"probes": [SGD | {"subset": str(tmp_path / "list.txt")}]}, store=store, run=tmp_path / "r"
    )
    both = featcache.train_probes(GRID | {"probes": [SGD]}, store=store, run=tmp_path / "r")
    for row in first.scores:
        assert both.row(row["probe"], row["metric"], row["split"])["value"] == row["value"]
    (tmp_path / "list.txt").write_text("\n".join(ids[:301]))
    before = len(find_probes(both.path))
    with pytest.raises(BadInput, match="list.txt lists other images than when it was trained on; choose another --run"):
        featcache.train_probes(GRID | {"probes": [SGD | {"seed": 1}]}, store=store, run=tmp_path / "r")
    assert len(find_probes(both.path)) == before
