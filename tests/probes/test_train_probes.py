"""train-probes from the command line: run folders, resume, selection, refusals."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from folders import tree_hash
from grids import GRID
from sklearn.metrics import average_precision_score
from stores import write_store

import featcache
from featcache.errors import BadInput
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import find_probes, load_probe, load_probes
from featcache.probes.runs.run import open_run, select
from featcache.probes.scores.metrics import metrics_of
from featcache.store.manifest import identity_hash
from featcache.store.sealed import seal, unseal


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run of GRID."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


def write_grid(path, content=None):
    path.write_text(yaml.safe_dump(content or GRID))
    return path


def test_the_run_folder(run):
    assert sorted(p.name for p in run.path.iterdir()) == [
        "calibration.csv", "grid.yaml", "history.csv", "probes", "run.json", "scores.csv", "scores_per_class.csv",
        "seeds.csv",
    ]  # fmt: skip
    with open(run.path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:9] == ["probe", "name", "split", "metric", "value", "low", "high", "epoch", "features"]
    assert len(rows) == 9 * 3 * 9 and {r["split"] for r in rows} == {"train", "val", "test"}
    assert {r["metric"] for r in rows} == set(metrics_of("multi-label"))
    assert {r["features"] for r in rows} == {"layer4:pooled", "layer4:spatial"}, "aliases are resolved"
    assert {r["low"] + r["high"] for r in rows if r["split"] == "train"} == {""}, (
        "intervals of train are for the asking"
    )
    bounded = [r for r in rows if r["split"] != "train"]
    assert all(0 <= float(r["low"]) <= float(r["high"]) <= (math.inf if r["metric"] == "nll" else 1) for r in bounded)
    with open(run.path / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert len(history) == 8 * 4 + 2
    assert len(find_probes(run.path)) == 9
    assert len(list((run.path / "probes").iterdir())) == 2, "a file for the linear probes, and one for the MLP"
    assert featcache.probes.grids.grid.read_grid(run.path / "grid.yaml").specs, "the resolved grid is a grid"


def test_scores_are_those_of_the_saved_probes(run, store):
    """Score every saved probe again with an ordinary module and scikit-learn."""
    test = featcache.open_store(store)["test"]
    maps, labels = torch.from_numpy(test["spatial"][:]).float(), test.labels
    for probe in {r["probe"] for r in run.scores}:
        trained = load_probe(run.path, probe)
        logits = HeadModule(trained.spec.head, trained.weights)(maps).numpy()
        values = []
        for c in range(labels.shape[1]):
            known = labels[:, c] != -1
            if (labels[:, c] == 1).any():
                values.append(average_precision_score(labels[known, c] == 1, logits[known, c]))
        assert run.row(probe, "map", "test")["value"] == pytest.approx(np.mean(values), abs=1e-6)


def test_finished_runs_return_at_once(run, store, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    before = tree_hash(tmp_path / "r")
    code, out, err = command(
        "train-probes", "--grid", write_grid(tmp_path / "g.yaml"), "--store", store, "--run", tmp_path / "r"
    )
    assert code == 0 and "is finished already" in err and "best 9 of 9 probes by val mAP" in out
    assert tree_hash(tmp_path / "r") == before


def test_an_interrupted_run_trains_only_what_is_missing(run, store, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    summary = json.loads((tmp_path / "r/run.json").read_text())
    (tmp_path / "r/run.json").write_text(
        json.dumps({k: summary[k] for k in ("store_id", "seed", "splits", "select", "search")})
    )
    (tmp_path / "r/scores.csv").unlink()
    # Some of the linear probes were done before the others: here, in a run of their own.
    some = featcache.train_probes(refuse({"seed": 1, "loss": "ce"}), store=store, run=tmp_path / "some")
    shutil.rmtree(tmp_path / "r/probes")
    shutil.copytree(some.path / "probes", tmp_path / "r/probes")
    with pytest.raises(BadInput, match="not finished"):
        open_run(tmp_path / "r")
    code, _, err = command(
        "train-probes", "--grid", write_grid(tmp_path / "g.yaml"), "--store", store, "--run", tmp_path / "r"
    )
    assert code == 0 and "2 of 9 probes are trained already" in err
    ids = find_probes(run.path)
    whole, parts = ({p.spec.id: p for p in load_probes(folder, ids)} for folder in (run.path, tmp_path / "r"))
    for name, probe in whole.items():
        assert probe.losses == parts[name].losses
        for key, weight in probe.weights.items():
            assert torch.equal(weight, parts[name].weights[key]), "retrained in other company, to the bit"
    assert (tmp_path / "r/scores.csv").read_bytes() == (run.path / "scores.csv").read_bytes()


def test_a_longer_grid_trains_only_the_new_probes(run, store, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "r")
    longer = {"probes": [GRID["probes"][0] | {"seed": [0, 1, 2]}, GRID["probes"][1]]}
    grown = featcache.train_probes(longer, store=store, run=tmp_path / "r")
    assert "9 of 13 probes are trained already" in capsys.readouterr().err
    for row in run.scores:
        again = grown.row(row["probe"], row["metric"], row["split"])
        assert [again[k] for k in ("value", "low", "high")] == [row[k] for k in ("value", "low", "high")]


def test_select(run):
    (best,) = select(run, "best mAP")
    assert run.row(best, "map", "val")["value"] == max(
        r["value"] for r in run.scores if (r["split"], r["metric"]) == ("val", "map")
    )
    per_loss = select(run, "best map per loss, head")
    kinds = [(run.row(p, "map", "val")["loss.type"], run.row(p, "map", "val")["head.type"]) for p in per_loss]
    assert sorted(kinds) == [("bce", "linear"), ("bce", "mlp"), ("ce", "linear")]
    for rule, message in (
        ("top", "expected 'best METRIC'"),
        ("best mpa", "did you mean 'map'"),
        ("best map per hed", "unknown field 'hed'"),
        ("best map per value", "unknown field 'value'"),
        ("best map per split", "unknown field 'split'"),
    ):
        with pytest.raises(BadInput, match=message):
            select(run, rule)


def test_a_diverged_probe_is_marked_and_has_no_scores(store, tmp_path, capsys):
    probes = [GRID["probes"][0] | {"optimizer": {"type": "sgd", "lr": [0.1, 1e38]}, "seed": 0, "loss": "bce"}]
    run = featcache.train_probes({"probes": probes}, store=store, run=tmp_path / "r")
    assert "lr 1e+38) diverged in epoch" in capsys.readouterr().err
    assert len(run.summary["diverged"]) == 1
    assert {r["value"] is None for r in run.scores if r["probe"] == run.summary["diverged"][0]} == {True}
    assert select(run, "best map")[0] not in run.summary["diverged"]
    again = load_probe(run.path, run.summary["diverged"][0])
    assert again.diverged is not None and any(np.isnan(again.losses))


def test_single_label_stores_score_top_k(tmp_path):
    write_store(tmp_path / "s.zarr", dtype="float32", single=True)
    content = {"splits": {"train": "train", "val": [], "test": []}, "probes": GRID["probes"][:1]}
    with pytest.raises(BadInput, match="splits.val: expected the name"):
        featcache.train_probes(content, store=tmp_path / "s.zarr", run=tmp_path / "r")


def test_top_k_run(tmp_path):
    """A store whose one split is copied under three names stands in for a single-label dataset."""
    write_store(tmp_path / "s.zarr", dtype="float32", single=True)
    file = tmp_path / "s.zarr/manifest.json"
    manifest = unseal(file.read_bytes())
    manifest["identity"] |= {"weights_sha256": "0"}
    manifest["id"] = identity_hash(manifest["identity"])
    for split in ("train", "val", "test"):
        if split != "train":
            shutil.copytree(tmp_path / "s.zarr/train", tmp_path / f"s.zarr/{split}")
            shutil.copytree(tmp_path / "s.zarr/commits/train", tmp_path / f"s.zarr/commits/{split}")
        for marker in (tmp_path / f"s.zarr/commits/{split}").iterdir():
            marker.write_bytes(seal(unseal(marker.read_bytes()) | {"split": split, "store": manifest["id"]}))
        manifest["splits"][split] = manifest["splits"]["train"]
        named = {name: entry for name, entry in manifest["files"].items() if name.startswith("train/")}
        manifest["files"] |= {name.replace("train", split, 1): entry for name, entry in named.items()}
    file.write_bytes(seal(manifest))
    run = featcache.train_probes(
        {"probes": GRID["probes"][:1]}, store=tmp_path / "s.zarr", run=tmp_path / "r", allow_overlap=True
    )
    assert {r["metric"] for r in run.scores} == {"top1", "top5", "balanced_accuracy", "nll", "ece"}
    known = {"top1": 1 / 3, "top5": 1.0, "balanced_accuracy": 1 / 3}
    assert run.summary["chance"]["test"] == known | {"nll": None, "ece": None}
    assert featcache.report([run.path], tmp_path / "r.html").stat().st_size > 10_000
    with pytest.raises(BadInput, match="'map' does not fit single-label labels; use top1 or top5 or balanced_accuracy"):
        featcache.train_probes(
            {"select": {"metric": "map"}, "probes": GRID["probes"][:1]}, store=tmp_path / "s.zarr", run=tmp_path / "q"
        )


def refuse(change):
    return {"probes": [GRID["probes"][0] | change]}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (refuse({"epoch": 3}), [], "probes[0].epoch: unknown field; did you mean 'epochs'?"),
        (refuse({"optimizer": {"type": "sgd", "lr": -1}}), [], "probes[0].optimizer.lr: -1"),
        (refuse({"features": "layer2:pooled"}), [], "the store holds no feature 'layer2:pooled'"),
        (refuse({"head": "mlp"}), [], "pool: before"),
        (
            refuse({"head": {"type": "mlp", "pool": "before"}, "batch_size": 1}),
            [],
            "probes[0].batch_size: one image has no variance",
        ),
        (GRID | {"splits": {"val": "vall"}}, [], "splits.val: store"),
        (GRID, ["--store", "nowhere.zarr"], "store not found: nowhere.zarr"),
    ],
)
def test_refusals_are_one_clear_line(store, tmp_path, command, content, words, message):
    code, _, err = command(
        "train-probes",
        "--grid",
        write_grid(tmp_path / "g.yaml", content),
        "--store",
        store,
        "--run",
        tmp_path / "r",
        *words,
    )
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "r").exists(), "nothing half-written is left behind"


def test_all_that_does_not_fit_the_store_is_said_at_once(store, tmp_path):
    base = {"head": "linear", "features": "pooled", "precision": "float32"}
    wrong = [
        {"features": "layer2:pooled"},
        {"head": "bcos"},
        {"precision": "tf32"},
        {"features": ["pooled", "layer4:pooled"]},
    ]
    grid = {"probes": [GRID["probes"][0] | base | change | {"seed": n} for n, change in enumerate(wrong)]}
    with pytest.raises(BadInput) as caught:
        featcache.train_probes(grid, store=store, run=tmp_path / "r")
    head, *lines = caught.value.message.split("\n  ")
    assert head == "grid has 4 errors:"
    for line, start in zip(lines, (
        "probes[0].features: the store holds no feature 'layer2:pooled'; did you mean 'layer4:pooled'?",
        "probes[1].features: a head of type bcos on layer4:pooled",
        "probes[2].precision: tf32 is of NVIDIA GPUs",
        "probes[3]: repeats a probe of probes[3]; features and views",
    ), strict=True):  # fmt: skip
        assert line.startswith(start)
    with pytest.raises(BadInput, match=r"has 2 errors:\n  splits.val: store .*\n  splits.test: store "):
        featcache.train_probes(GRID | {"splits": {"val": "a", "test": "b"}}, store=store, run=tmp_path / "r")


def test_a_run_prints_as_one_line(run, store):
    opened = featcache.open_store(store)
    plan = featcache.plan_probes(GRID, store)
    for value in (run, opened, opened["val"], opened["val"]["pooled"], opened.manifest, plan, plan.grid):
        assert len(repr(value)) < 150
    assert repr(run) == f"Run({str(run.path)!r}, 9 probes, scored on test)"
    assert len(repr(load_probe(run.path, run.scores[0]["probe"]))) < 150


@pytest.mark.parametrize("place", ["s3://bucket/r", "file:///tmp/r"])
def test_a_url_is_no_place_for_what_is_written(run, store, command, tmp_path, monkeypatch, place):
    """Only stores lie at URLs: no folder called `s3:` is made."""
    grid = write_grid(tmp_path / "g.yaml")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for option, words in (
        ("--run", ["train-probes", "--grid", grid, "--store", store, "--run", place]),
        ("--run", ["attribute", "--run", place]),
        ("--run", ["compare", "--run", place, "--select", "best map"]),
        ("--run", ["import-probes", "x.pth", "--store", store, "--loss", "bce", "--run", place]),
        ("--out", ["report", "--run", run.path, "--out", f"{place}.html"]),
        ("--to", ["export", "x.pth", "--to", f"{place}.pth"]),
        ("--out", ["demo", "--data-only", "--out", place]),
    ):
        code, _, err = command(*words)
        assert code == 2 and f"{option} {place}" in err and "is a URL, where only stores can lie" in err, err
        assert sorted(tmp_path.iterdir()) == before


def test_a_run_is_a_path():
    with pytest.raises(BadInput, match="run: expected the path of a folder, not 5"):
        featcache.open_run(5)


def test_no_store_and_foreign_folders(run, store, tmp_path, command):
    code, _, err = command("train-probes", "--grid", write_grid(tmp_path / "g.yaml"))
    assert code == 2 and "give --store" in err
    code, _, err = command("train-probes", "--grid", tmp_path / "g.yaml", "--store", store, "--run", tmp_path)
    assert code == 2 and "is not a run folder" in err
    code, _, err = command(
        "train-probes", "--grid", tmp_path / "g.yaml", "--store", store, "--run", run.path, "--seed", 1
    )
    assert code == 2 and "was made with seed 0, not 1" in err


@pytest.mark.parametrize("change", [{"select": {"metric": "nll"}}, {"search": "halving"}])
def test_a_run_is_of_one_choice(run, store, change):
    """What is kept or dropped by one metric does not mix with what another would have."""
    with pytest.raises(BadInput, match=f"was made with {next(iter(change))} .*; choose another --run"):
        featcache.train_probes(GRID | change, store=store, run=run.path)


@pytest.mark.parametrize("name", ["probe", "scores.csv", "calibration.csv", "scores_per_class.csv"])
def test_what_is_deleted_from_a_finished_run_is_made_again(run, store, tmp_path, name):
    shutil.copytree(run.path, tmp_path / "r")
    lost = next((tmp_path / "r/probes").iterdir()) if name == "probe" else tmp_path / "r" / name
    expected = lost.read_bytes()
    lost.unlink()
    featcache.train_probes(GRID, store=store, run=tmp_path / "r")
    assert lost.read_bytes() == expected
    if name == "probe":
        assert find_probes(tmp_path / "r").keys() == find_probes(run.path).keys()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seed": -1}, "seed: expected a whole number from 0 to 4294967295, not -1"),
        ({"seed": 2**60}, "seed: expected a whole number"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"memory": float("nan")}, "memory: expected a number of bytes"),
        ({"memory": float("inf")}, "memory: expected a number of bytes"),
        ({"memory": -1}, "memory: expected a number of bytes"),
        ({"grid": []}, "grid: expected the path of a YAML file, or its content as a dict"),
    ],
)
def test_arguments_that_make_no_sense(store, tmp_path, given, message):
    with pytest.raises(BadInput, match=message):
        featcache.train_probes(**{"grid": GRID, "store": store, "run": tmp_path / "r"} | given)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "text, message", [("[]", "run.json: it is no JSON object"), ('{"key": "a"}', "run.json: it lacks store")]
)
def test_a_run_json_that_is_something_else(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_run(tmp_path)


def test_mlp_on_pooled_when_asked_for(store, tmp_path):
    content = refuse({"head": {"type": "mlp", "hidden": 4, "pool": "before"}, "loss": "bce", "seed": 0})
    run = featcache.train_probes(content, store=store, run=tmp_path / "r")
    assert {r["head.pool"] for r in run.scores} == {"before"}


def test_pool_before_and_pooled_features_are_the_same_probe(store, tmp_path):
    head = {"type": "mlp", "hidden": 4, "pool": "before"}
    content = refuse({"head": head, "loss": "bce", "seed": 0, "features": ["pooled", "spatial"]})
    run = featcache.train_probes(content, store=store, run=tmp_path / "r")
    pooled, spatial = (
        [r["value"] for r in run.scores if r["features"] == f"layer4:{f}"] for f in ("pooled", "spatial")
    )
    assert pooled == pytest.approx(spatial, abs=1e-3)


@pytest.mark.parametrize("damage", ["cut", "junk", "gone"])
def test_damaged_probes_are_named(run, tmp_path, damage):
    shutil.copytree(run.path, tmp_path / "r")
    file = next((tmp_path / "r/probes").iterdir())
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40] if damage == "cut" else b"x" * 100)
    with pytest.raises(BadInput, match="no probe|damaged probe"):
        for probe in find_probes(run.path):
            load_probe(tmp_path / "r", probe)


def test_a_store_without_a_test_split_is_scored_on_val(checkpoint, scenes, tmp_path, command):
    store = featcache.extract(
        checkpoint, "voc", root=scenes, splits=["train", "val"], size=64, workers=0, store=tmp_path / "s.zarr"
    )
    grid = write_grid(tmp_path / "g.yaml", {"probes": GRID["probes"][:1]})
    code, out, _ = command("train-probes", "--grid", grid, "--store", store, "--run", tmp_path / "r")
    assert code == 0 and "val mAP % [95%]" in out and "chance on val" in out and "test" not in out.split("run:")[0]
    assert command("report", "--run", tmp_path / "r", "--out", tmp_path / "r.html")[0] == 0
    assert "chosen on the images that they are scored on, val: the scores are too good" in out
    assert "scored on val" in (tmp_path / "r.html").read_text()
    named = write_grid(tmp_path / "n.yaml", {"splits": {"test": "test"}, "probes": GRID["probes"][:1]})
    code, _, err = command("train-probes", "--grid", named, "--store", store, "--run", tmp_path / "q")
    assert code == 2 and "splits.test: store" in err
