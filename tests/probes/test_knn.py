"""`featcache knn` and kNN probes in grids: their scores are those of a slow search, and their run is like any other."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from processes import free_port
from sklearn.metrics import average_precision_score
from stores import write_features

import featcache
from featcache.errors import BadInput
from featcache.probes.inputs.input import Input
from featcache.probes.neighbours.rows import TrainingRows
from featcache.probes.sample import draw_rows
from featcache.store.reader import open_store

CLASSES, WIDTH, SIZES = ("ant", "bee", "cat", "dog"), 12, {"train": 240, "val": 90, "test": 110}
KNN = {
    "name": "knn",
    "features": "pooled",
    "head": {"type": "knn", "k": 5},
    "loss": "ce",
    "optimizer": "none",
    "views": 0,
}
LINEAR = {
    "name": "linear", "features": "pooled", "head": "linear", "loss": "ce", "epochs": 2, "batch_size": 32,
    "optimizer": {"type": "sgd", "lr": 0.1},
}  # fmt: skip


def images(several=False, change=lambda split, values: None):
    """{split: (ids, labels, features)}, noisy clusters. several: labels of several classes, some of them -1."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(len(CLASSES), WIDTH))
    made = {}
    for split, count in SIZES.items():
        labels = random.integers(0, len(CLASSES), count)
        values = (centres[labels] + 1.2 * random.normal(size=(count, WIDTH))).astype(np.float32)
        change(split, values)
        if several:
            labels = np.eye(len(CLASSES), dtype=np.int8)[labels]
            labels[random.random(labels.shape) < 0.2] = 1
            labels[random.random(labels.shape) < 0.1] = -1
        made[split] = [f"{split}/{n}" for n in range(count)], labels, values
    return made


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("single") / "s.zarr", images(), CLASSES)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("several") / "s.zarr", images(several=True), CLASSES)


def votes(queries, rows, labels, k, temperature=0.07, own=False):
    """DINO's votes in float64, for labels one-hot [N, C]: [n, C]."""
    x, y = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True) for v in (queries, rows))
    s = x @ y.T
    if own:
        np.fill_diagonal(s, -np.inf)
    nearest = np.argsort(-s, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(s, nearest, 1) / temperature)
    return (weights[:, :, None] * labels[nearest]).sum(1)


def top1(queries, labels, *rest, **more):
    return (votes(queries, *rest, **more).argmax(1) == labels).mean()


def test_scores_are_those_of_a_slow_search(single, tmp_path, command):
    code, out, err = command(
        "knn", "--store", single, "--run", tmp_path / "run", "--k", "1,5,20", "--temperature", "0.07,0.2"
    )
    assert code == 0 and "kNN: 240 training images of layer4:pooled (12 numbers), held in memory; " in err
    run, data = featcache.open_run(tmp_path / "run"), images()
    rows, labels = data["train"][2], np.eye(4)[data["train"][1]]
    assert run.summary["probes"] == 6 and "best 6 of 6 probes by val top-1" in out and "knn (20)" in out
    for row in run.scores:
        if row["metric"] == "top1" and row["split"] != "train":
            queries = data[row["split"]]
            wanted = top1(queries[2], queries[1], rows, labels, int(row["head.k"]), float(row["head.temperature"]))
            assert row["value"] == pytest.approx(wanted) and row["low"] < row["value"] < row["high"]
        elif row["split"] == "train":
            assert row["value"] is None, "training images would have themselves as neighbours"


def test_training_images_leave_themselves_out(single, tmp_path, command):
    """So that k can be chosen where there is no val."""
    code, out, _ = command("knn", "--store", single, "--run", tmp_path / "run", "--k", "1,3,9", "--leave-one-out")
    assert code == 0 and "train top-1" in out
    run, (_, labels, rows) = featcache.open_run(tmp_path / "run"), images()["train"]
    assert run.chosen_on == "train"
    for k in (1, 3, 9):
        (value,) = [
            r["value"] for r in run.scores if (r["head.k"], r["split"], r["metric"]) == (str(k), "train", "top1")
        ]
        assert value == pytest.approx(top1(rows, labels, rows, np.eye(4)[labels], k, own=True))


def test_all_are_reported_where_nothing_can_be_chosen(single, tmp_path, command, monkeypatch):
    """When val is trained on, or the store has none."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("knn", "--store", single, "--k", "1,9", "--train", "train, val")
    assert code == 0 and "nothing was chosen" in out and "knn (1)" in out and "knn (9)" in out
    assert "loss" not in out.splitlines()[0], "nothing is trained"
    (run,) = (tmp_path / "runs").glob("knn-*")
    assert featcache.open_run(run).chosen_on is None


def test_few_shots_have_a_mean_over_draws(single, tmp_path, command):
    code, _, err = command(
        "knn", "--store", single, "--run", tmp_path / "run", "--shots", "2,8", "--tries", "3", "--k", "5,20"
    )
    assert code == 0 and "2 shots: k 5, 20 left out, which is more than 2" in err and "8 shots: k 20 left out" in err
    data = images()
    (_, labels, rows), (_, tested, queries) = data["train"], data["test"]
    with (tmp_path / "run/seeds.csv").open() as file:
        found = {
            (r["shots"], r["head.k"]): r for r in csv.DictReader(file) if (r["split"], r["metric"]) == ("test", "top1")
        }
    assert set(found) == {("2", "2"), ("8", "5"), ("8", "8")}
    for (shots, k), row in found.items():
        drawn = [draw_rows(labels, CLASSES, shots=int(shots), draw=draw) for draw in range(3)]
        scores = [top1(queries, tested, rows[d], np.eye(4)[labels[d]], int(k)) for d in drawn]
        assert float(row["mean"]) == pytest.approx(np.mean(scores)) and float(row["std"]) == pytest.approx(
            np.std(scores, ddof=1)
        )
    assert featcache.verify(tmp_path / "run") == []


def test_two_ranks_write_the_run_of_one_and_say_all_once(single, tmp_path, command):
    words = ("knn", "--store", single, "--shots", "2", "--tries", "2", "--k", "1,5", "--run")
    assert command(*words, tmp_path / "one")[0] == 0
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "--"]
    done = subprocess.run(
        [sys.executable, *launch, "featcache", *map(str, words), tmp_path / "two"], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 shots: k 5 left out, which is more than 2") == 1 and done.stdout.count("run: ") == 1
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.name != "run.json":
            assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path


def test_several_labels_have_a_mean_average_precision(several, tmp_path):
    run = featcache.knn(several, k=15, run=tmp_path / "run")
    data = images(several=True)
    labels, tested = data["train"][1], data["test"][1]
    for_and_against = [votes(data["test"][2], data["train"][2], labels == value, 15) for value in (1, 0)]
    shares = for_and_against[0] / np.maximum(sum(for_and_against), 1e-300)
    known = tested >= 0
    scores = [average_precision_score(tested[known[:, c], c], shares[known[:, c], c]) for c in range(4)]
    assert run.row(run.scores[0]["probe"], "map", "test")["value"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert {row["class"] for row in run.table("scores_per_class.csv")} == set(CLASSES)


def test_a_grid_holds_knn_beside_trained_probes(single, tmp_path, command):
    """Neither depends on the other; report, compare and verify take both; and the same probes have the same ids."""
    heads = {"type": "knn", "k": [5, 9], "weights": ["exp", "uniform"]}
    both = featcache.train_probes({"probes": [LINEAR, KNN | {"head": heads}]}, single, tmp_path / "both")
    alone = featcache.train_probes({"probes": [LINEAR]}, single, tmp_path / "alone")
    ours = featcache.knn(single, k=[5, 9], run=tmp_path / "knn")
    values = [{(r["probe"], r["metric"], r["split"]): r["value"] for r in run.scores} for run in (both, alone, ours)]
    assert all(values[0][key] == value for others in values[1:] for key, value in others.items())
    code, out, _ = command("compare", "--run", tmp_path / "both", "--select", "best top1 per head")
    assert code == 0 and "top-1" in out
    (first, second) = featcache.compare(tmp_path / "both", rule="best top1 per head")[0].probes
    assert {first, second} <= {row["probe"] for row in both.scores}
    assert command("report", "--run", tmp_path / "both", "--out", tmp_path / "page.html")[0] == 0
    assert "knn (5)" in (tmp_path / "page.html").read_text()
    assert command("verify", tmp_path / "both")[0] == 0


def test_folds_and_refits_choose_k(single, tmp_path):
    """Each fold votes without the images that it holds out; a refit votes with those of val too."""
    grid = {
        "probes": [KNN | {"head": {"type": "knn", "k": [1, 9]}}],
        "select": {"split": "val"},
        "refit": ["train", "val"],
    }
    run = featcache.train_probes(grid, single, tmp_path / "refit")
    data = images()
    rows = np.concatenate([data[s][2] for s in ("train", "val")])
    labels = np.eye(4)[np.concatenate([data[s][1] for s in ("train", "val")])]
    (refit,) = [r for r in run.scores if r.get("refit") and (r["split"], r["metric"]) == ("test", "top1")]
    assert refit["value"] == pytest.approx(top1(data["test"][2], data["test"][1], rows, labels, int(refit["head.k"])))
    folds = {"probes": grid["probes"], "select": {"folds": 4}, "splits": {"train": "train", "test": "test"}}
    run = featcache.train_probes(folds, single, tmp_path / "folds")
    assert all(r["value"] is not None for r in run.scores if r["split"] == "folds")


def test_a_map_is_averaged(store, tmp_path):
    """So it has the scores of the pooled feature."""
    runs = [featcache.knn(store, features=f, k=[3, 9], run=tmp_path / f) for f in ("pooled", "spatial")]
    values = [[r["value"] for r in run.scores if r["metric"] == "map" and r["split"] == "test"] for run in runs]
    np.testing.assert_allclose(*values, atol=1e-6)


@pytest.mark.parametrize("wanted", [None, [3, 4, 100, 238]])
def test_rows_are_the_same_in_memory_and_read_again(single, wanted):
    store, cpu = open_store(single), torch.device("cpu")
    numbers = None if wanted is None else torch.tensor(wanted)
    held, read = (
        TrainingRows(Input("layer4:pooled"), store, ["train"], cpu, numbers, held=held) for held in (True, False)
    )
    values = torch.from_numpy(images()["train"][2])
    values = values if wanted is None else values[wanted]
    some = torch.tensor([3, 0, 2, 3])
    for rows in (held, read):
        assert rows.count == len(values) and torch.equal(torch.cat([tile for _, tile in rows.tiles()]), values)
        assert torch.equal(rows.pick(some), values[some])
        assert torch.allclose(rows.norms, values.double().norm(dim=1))


@pytest.mark.process
def test_a_killed_run_goes_on(single, tmp_path):
    """It ends with the files of a run that nothing disturbed."""
    words = [
        sys.executable,
        "-m",
        "featcache",
        "knn",
        "--store",
        str(single),
        "--k",
        "3,9",
        "--shots",
        "5",
        "--tries",
        "2",
        "--run",
    ]
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = subprocess.Popen([*words, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/probes/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    subprocess.run([*words, str(tmp_path / "killed")], check=True, capture_output=True)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*.*") if p.name != "run.json") for f in folders]
    assert names[0] == names[1]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names[0])
    assert featcache.verify(folders[1]) == []


def test_there_are_no_weights_to_export_or_explain(store, checkpoint, tmp_path, command):
    run = featcache.knn(store, features="spatial", k=3, run=tmp_path / "run")
    probe = run.scores[0]["probe"]
    line = "Error: a kNN probe has no weights: it votes with the training images, so that there is nothing to export"
    code, _, err = command("attribute", "--run", run.path)
    assert code == 2 and line in err
    code, _, err = command(
        "export", "--run", run.path, "--probe", probe, "--backbone", checkpoint, "--to", tmp_path / "m.safetensors"
    )
    assert code == 2 and line in err


def zeros(split, values):
    if split == "test":
        values[7] = 0


def constant(split, values):
    values[:] = values[0] if split == "test" else 3


def infinite(split, values):
    if split == "train":
        values[11, 3] = np.inf


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (zeros, "feature layer4:pooled of test 'test/7' in store .* is all zero, and has no cosine"),
        (infinite, "feature layer4:pooled of train 'train/11' in store .* is not finite"),
        (constant, "feature layer4:pooled is the same for all images of train: nothing can be learned from it"),
    ],
)
def test_features_without_neighbours(tmp_path, change, line):
    store = write_features(tmp_path / "s.zarr", images(change=change), CLASSES)
    with pytest.raises(BadInput, match=line):
        featcache.knn(store, k=3, run=tmp_path / "run", allow_overlap=True)
    if change is zeros:
        assert featcache.knn(store, k=3, distance="euclidean", run=tmp_path / "other").summary["probes"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--k", "241"], "k is 241, and there are 240 training images to choose neighbours from; take a smaller k"),
        (["--k", "240", "--leave-one-out"], "k is 240, and there are 240 training images, each without itself,"),
        (["--k", "0"], "0 is not a whole number of at least 1"),
        (["--k", "x"], "'x' is not a whole number"),
        (["--temperature", "0"], "0.0 is not a number above 0"),
        (["--temperature", "-1"], "-1.0 is not a number above 0"),
        (["--temperature", "nan"], "is not a number above 0"),
        (
            ["--weights", "dinov"],
            "--weights: 'dinov' is not one of dino, openmixup, dinov2, lightly, vissl, uniform, inverse",
        ),
        (["--distance", "cosinus"], "did you mean 'cosine'?"),
        (["--weights", "inverse", "--distance", "dot"], "a dot product is none: take distance cosine or euclidean"),
        (["--features", "last:spatial"], "holds no feature 'layer4:spatial'"),
        (["--test", "tests"], "has no split 'tests'; did you mean 'test'?"),
        (["--shots", "500"], "500 images of each class are asked for"),
        (["--shots", "0"], "--shots: expected a whole number of at least 1, not 0"),
        (["--memory", "0.00001"], "--memory: a search for neighbours among 240 images needs at least"),
    ],
)
def test_bad_input(single, tmp_path, command, words, line):
    code, _, err = command("knn", "--store", single, "--run", tmp_path / "run", *words)
    assert code == 2 and line in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"optimizer": {"type": "sgd", "lr": 1}, "epochs": 1}, "a knn head is not trained: say optimizer: none"),
        ({"head": "linear"}, "optimizer none trains nothing, and a head of type linear has weights to train"),
        ({"views": 2}, "a knn head remembers the images as they are: say views: 0"),
        ({"loss": {"type": "ce", "label_smoothing": 0.1}}, "of its loss, it reads the type and difficult alone"),
        ({"precision": "bf16"}, "precision bf16 is not for knn heads"),
        ({"head": {"type": "knn", "k": 1, "offset": 1}}, "a knn head has no offset"),
    ],
)
def test_bad_grids(single, change, line):
    with pytest.raises(BadInput, match=line):
        featcache.train_probes({"probes": [KNN | change]}, single)


def test_choosing_on_training_images_needs_leave_one_out(single):
    with pytest.raises(BadInput, match="say leave_one_out: true"):
        featcache.train_probes({"probes": [KNN], "select": {"split": "train"}}, single)


def test_names_stand_for_published_settings(single, tmp_path):
    """openmixup, dino and dinov2 vote alike; lightly and vissl choose another k, temperature and distance."""
    ids = {}
    for name in ("dino", "openmixup", "dinov2", "lightly", "vissl"):
        run = featcache.knn(single, weights=name, run=tmp_path / name)
        ids[name] = {row["probe"] for row in run.scores}
        fields = {(r["head.k"], r["head.temperature"], r["head.distance"]) for r in run.scores}
        if name in ("lightly", "vissl"):
            assert fields == {("200", "0.1", "cosine" if name == "lightly" else "dot")}
        else:
            assert fields == {(k, "0.07", "cosine") for k in ("10", "20", "100", "200")}
    assert ids["dino"] == ids["openmixup"] == ids["dinov2"]
    grid = json.loads((tmp_path / "dino/run.json").read_text())["grids"]
    assert list(grid.values()) == ["grid.yaml"]
