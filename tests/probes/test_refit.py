"""refit: the recipes that were chosen on val are trained again on train and val, and reported in place of the chosen."""

import numpy as np
import pytest
import torch
import yaml
from digits import CLASSES, digits
from folders import tree_hash
from stores import write_features

import featcache
from featcache.errors import BadInput
from featcache.probes.runs.probe_file import find_probes, load_probe
from featcache.probes.runs.run import best, select
from featcache.reporting.table import score_rows

pytestmark = pytest.mark.process

LINEAR = {
    "name": "linear", "features": "pooled", "head": "linear", "loss": ["ce", "bce"], "epochs": 8, "batch_size": 32,
    "optimizer": {"type": "sgd", "lr": [0.01, 0.1, 1.0]}, "seed": [0, 1],
}  # fmt: skip
GRID = {"refit": ["train", "val"], "probes": [LINEAR]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of digits."""
    return write_features(tmp_path_factory.mktemp("digits") / "s.zarr", digits(), CLASSES)


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    """A store whose train split has the images of train and val."""
    splits = digits()
    both = [splits.pop("val"), splits["train"]][::-1]
    splits["train"] = [*both[0][0], *both[1][0]], *(np.concatenate([one[k] for one in both]) for k in (1, 2))
    return write_features(tmp_path_factory.mktemp("union") / "u.zarr", splits, CLASSES)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run of GRID."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def mean_on_val(run, row):
    """The mean score on val over the seeds of a probe."""
    alike = ("head.type", "loss.type", "optimizer.lr", "refit")
    seeds = {r["probe"] for r in run.scores if all(r[k] == row[k] for k in alike)}
    return np.mean([run.row(probe, "top1", "val")["value"] for probe in seeds])


def test_the_best_recipe_of_each_loss_is_trained_again_with_all_its_seeds(run, store):
    plain = {r["probe"]: r for r in run.scores if not r["refit"]}
    again = {r["probe"]: r for r in run.scores if r["refit"]}
    assert len(plain) == 12 and len(again) == 4 and run.summary["probes"] == 16
    assert {r["refit"] for r in again.values()} == {"train+val"}
    for loss in ("ce", "bce"):
        means = {r["optimizer.lr"]: mean_on_val(run, r) for r in plain.values() if r["loss.type"] == loss}
        chosen = [r for r in again.values() if r["loss.type"] == loss]
        assert {r["optimizer.lr"] for r in chosen} == {max(means, key=means.get)}
        assert sorted(r["seed"] for r in chosen) == ["0", "1"]
    for probe, row in again.items():
        source = plain[row["refit_of"]]
        assert all(row[k] == source[k] for k in run.fields if k not in ("refit", "refit_of"))
        assert run.sources[probe] == source["probe"]


def test_a_refit_equals_a_probe_on_a_store_of_both_splits(run, union, tmp_path):
    grid = {"select": {"split": "train"}, "splits": {"train": "train", "test": "test"}, "probes": [LINEAR]}
    other = featcache.train_probes(grid, store=union, run=tmp_path / "r")
    for probe, source in run.sources.items():
        weights, expected = load_probe(run.path, probe).weights, load_probe(other.path, source).weights
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        for metric in run.metrics:
            scores = run.row(probe, metric, "test"), other.row(source, metric, "test")
            assert scores[0]["value"] == scores[1]["value"] and scores[0]["low"] == scores[1]["low"]


def test_a_refit_has_no_score_on_what_it_learned_from(run):
    for row in run.scores:
        assert (row["value"] is None) == (row["split"] == "val" and bool(row["refit"]))


def test_the_best_is_the_refit(run, store, command, tmp_path):
    (chosen,) = select(run, "best top1")
    plain = [
        r for r in run.scores if r["split"] == "val" and r["metric"] == "top1" and r["probe"] in run.sources.values()
    ]
    assert run.sources[chosen] == max(plain, key=lambda r: r["value"])["probe"]
    assert set(best(run, "loss")) == set(select(run, "best top1 per loss, head")) and len(best(run, "loss")) == 2
    assert set(best(run, "loss")) < run.sources.keys()
    columns, rows = score_rows(run)
    assert rows[0][columns.index("refit")] == "train+val" and rows[1][columns.index("refit")] == "-"
    assert rows[0][columns.index("val top-1 %")] == rows[1][columns.index("val top-1 %")]
    assert len({row[-1] for row in rows if row[0] in run.sources and row[2] == "ce"}) == 1, "mean over the seeds"
    code, out, _ = command("compare", "--run", run.path, "--store", store, "--select", "best top1 per loss")
    assert code == 0 and all(probe in out for probe in best(run, "loss"))
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "refit train+val" in page and "standard deviation (n - 1)" in page
    for rule in ("best top1 per lr", "best nll"):
        with pytest.raises(BadInput, match="trained again the best top1 per name, features, head, loss; ask for these"):
            select(run, rule)


def test_it_stops_at_the_epoch_that_was_chosen(store, union, tmp_path, capsys):
    """With the rates of the whole schedule, so that the same steps are taken as far as the best epoch."""
    group = LINEAR | {"loss": "ce", "keep": "best", "epochs": 12, "seed": 0, "schedule": "cosine", "patience": 4}
    run = featcache.train_probes(GRID | {"probes": [group]}, store=store, run=tmp_path / "r")
    ((again, source),) = run.sources.items()
    chosen, refit = load_probe(run.path, source), load_probe(run.path, again)
    assert chosen.epoch < 12 and refit.epoch == len(refit.losses) == chosen.epoch == refit.spec.stop
    assert (
        f"{source} (lr {chosen.spec.optimizer.lr:g}), chosen by val top-1, again on train+val as {again}, to epoch "
        in (capsys.readouterr().err)
    )
    rate = {"type": "sgd", "lr": chosen.spec.optimizer.lr}
    plain = {"select": {"split": "train"}, "splits": {"test": "test"}}
    longer = plain | {"probes": [group | {"optimizer": rate, "patience": 0}]}
    other = featcache.train_probes(longer, store=union, run=tmp_path / "o")
    (whole,) = (load_probe(other.path, probe) for probe in find_probes(other.path))
    assert refit.losses == whole.losses[: chosen.epoch]


def test_per_says_which_are_trained_again(store, tmp_path):
    grid = GRID | {"refit": {"per": ["lr"]}, "probes": [LINEAR | {"seed": 0}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert len(run.sources) == 3 and set(select(run, "best top1 per lr")) == run.sources.keys()
    again = featcache.train_probes(run.path / "grid.yaml", run=run.path)
    assert again.scores == run.scores


def test_a_refit_that_is_asked_for_later_trains_only_that(store, run, tmp_path, capsys):
    plain = featcache.train_probes({"probes": [LINEAR]}, store=store, run=tmp_path / "r")
    old = {path.name: path.read_bytes() for path in (plain.path / "probes").iterdir()}
    capsys.readouterr()
    later = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    assert "12 of 12 probes are trained already" in capsys.readouterr().err
    assert old.items() <= {path.name: path.read_bytes() for path in (later.path / "probes").iterdir()}.items()
    assert (later.path / "scores.csv").read_bytes() == (run.path / "scores.csv").read_bytes()
    # Another grid in the same run, which does not say so, is part of the choice all the same.
    better = {
        "probes": [LINEAR | {"name": "linear", "loss": "ce", "optimizer": {"type": "lbfgs", "weight_decay": 1e-3}}]
    }
    better["probes"][0] = {k: v for k, v in better["probes"][0].items() if k != "epochs"} | {"seed": 0}
    grown = featcache.train_probes(better, store=store, run=tmp_path / "r")
    scores = {
        r["probe"]: r["value"] for r in grown.scores if r["metric"] == "top1" and r["split"] == "val" and r["value"]
    }
    top = max(scores, key=scores.get)
    assert grown.summary["refit"] == run.summary["refit"]
    if grown.row(top, "top1", "val")["optimizer.type"] == "lbfgs":
        assert grown.sources[select(grown, "best top1")[0]] == top
    with pytest.raises(BadInput, match="was made with refit .*; choose another --run"):
        featcache.train_probes(GRID | {"refit": {"per": ["loss"]}}, store=store, run=tmp_path / "r")
    assert featcache.verify(grown.path) == []


def test_what_is_deleted_is_made_again(store, run, tmp_path):
    one = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    before = tree_hash(one.path / "probes")
    refit = find_probes(one.path)[next(iter(one.sources))].path
    refit.unlink()
    assert [finding.where for finding in featcache.verify(one.path)] == ["probes"]
    again = featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    assert tree_hash(again.path / "probes") == before and again.scores == run.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refit": ["train"]}, "refit: expected [train, val], the roles to train on again, not ['train']"),
        ({"refit": ["train", "test"]}, "refit: expected [train, val]"),
        ({"refit": {"per": ["lrr"]}}, "refit: per: unknown field 'lrr'; did you mean 'lr'?"),
        ({"refit": {"of": 1}}, "refit.of: unknown field"),
        ({"refit": ["train", "val"], "select": {"folds": 3}}, "refit: by folds, what is chosen is trained on all of train"),
        ({"splits": {"train": ["train", "val"]}, "select": {"split": "train"}}, "refit: there is no split in the role val"),
        ({"probes": [LINEAR | {"shots": 3}]}, "refit: all of val would join the few images of shots 3, draw 0"),
    ],
)  # fmt: skip
def test_what_is_refused(store, tmp_path, change, message):
    with pytest.raises(BadInput) as caught:
        featcache.train_probes(GRID | change, store=store, run=tmp_path / "r")
    assert message in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "r").exists()


def test_a_parity_profile_that_chooses_on_test_is_not_trained_on_it(store, tmp_path):
    profile = {"profiles": {"paper": {"splits": {"val": "test"}}}}
    with pytest.raises(BadInput, match="refit: val is the split that probes are scored on"):
        featcache.train_probes(GRID | profile, store=store, run=tmp_path / "r", parity="paper")


@pytest.fixture(scope="module")
def maps(scenes, checkpoint, tmp_path_factory):
    """A store of scenes with maps."""
    place = tmp_path_factory.mktemp("maps") / "s.zarr"
    return featcache.extract(checkpoint, "voc", root=scenes, size=64, workers=0, batch_size=8, store=place)


PARTS = {
    "refit": {"refit": ["train", "val"], "probes": [LINEAR | {"loss": "bce", "seed": 0}]},
    "folds": {"select": {"folds": 2}, "probes": [LINEAR | {"loss": "bce", "seed": 0, "label_fraction": 0.9}]},
    "shots": {"probes": [LINEAR | {"loss": "bce", "seed": 0, "shots": 1, "draw": [0, 1]}]},
}


@pytest.mark.parametrize("grid", PARTS.values(), ids=PARTS)
def test_what_is_chosen_goes_on_to_maps_and_exports(maps, checkpoint, tmp_path, command, grid):
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(grid))
    code, out, err = command("train-probes", "--grid", tmp_path / "g.yaml", "--store", maps, "--run", tmp_path / "r")
    assert code == 0, err
    run = featcache.open_run(tmp_path / "r")
    (chosen,) = select(run, "best map")
    assert out.splitlines()[2].startswith(chosen) and bool(run.sources) == ("refit" in grid)
    code, out, err = command("attribute", "--run", run.path, "--limit", 3)
    assert code == 0 and chosen in out and run.sources.get(chosen, "no other") not in out
    words = ["export", "--run", run.path, "--backbone", checkpoint]
    for name, option in (("rule", ["--select", "best map"]), ("probe", ["--probe", chosen])):
        code, _, err = command(*words, *option, "--to", tmp_path / f"{name}.safetensors")
        assert code == 0, err
    assert (tmp_path / "rule.safetensors").read_bytes() == (tmp_path / "probe.safetensors").read_bytes()
    for more, message in (
        (["--select", "best map", "--probe", chosen], "not both"),
        (["--select", "best map per lr"], "export writes one" if "refit" not in grid else "trained again the best map"),
    ):
        code, _, err = command(*words, *more, "--to", tmp_path / "x.pth")
        assert code == 2 and message in err
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0 and chosen in (tmp_path / "page.html").read_text(), err
    assert featcache.verify(run.path) == []
