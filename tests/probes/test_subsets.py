"""Probes that train on some of the images: they equal probes on a store of only these, and are scored over draws."""

import csv
import json

import numpy as np
import pytest
import torch
from digits import CLASSES, digits, several
from stores import write_features

import featcache
from featcache.errors import BadInput
from featcache.probes.inputs.input import Input, rows_within
from featcache.probes.inputs.streamed import Streamed
from featcache.probes.inputs.training_sets import TrainingSets
from featcache.probes.runs.probe_file import find_probes, load_probe, load_probes
from featcache.probes.sample import Sample, draw_rows
from featcache.reporting.table import score_rows

pytestmark = pytest.mark.process

SGD = {
    "name": "sgd", "features": "pooled", "head": "linear", "loss": "ce", "epochs": 3, "batch_size": 16,
    "optimizer": {"type": "sgd", "lr": 0.1},
}  # fmt: skip
FULL = {"name": "full", "features": "pooled", "head": "linear", "loss": "bce"}
FULL["optimizer"] = {"type": "lbfgs", "weight_decay": 1e-3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of digits."""
    return write_features(tmp_path_factory.mktemp("digits") / "s.zarr", digits(), CLASSES)


def part_of(tmp_path, rows, splits=None, classes=CLASSES):
    """A store whose train split has only some rows."""
    splits = splits or digits()
    ids, labels, values = splits["train"]
    splits["train"] = [ids[row] for row in rows], labels[rows], values[rows]
    return write_features(tmp_path / "part.zarr", splits, classes)


def assert_same_probes(run, other, exactly=True):
    """Probe by probe, in their order, the weights and the losses."""
    first, second = (
        [load_probe(r.path, p) for p in dict.fromkeys(row["probe"] for row in r.scores)] for r in (run, other)
    )
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for name, weights in one.weights.items():
            if exactly:
                assert torch.equal(weights, two.weights[name])
            else:
                torch.testing.assert_close(weights, two.weights[name], atol=1e-5, rtol=1e-4)
        assert one.losses == (two.losses if exactly else pytest.approx(two.losses, rel=1e-5))


def lines(store, tmp_path, rows):
    """A list of some training images, as a file."""
    ids = featcache.open_store(store)["train"].ids
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{ids[row]}.png\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("how", ["label_fraction", "shots", "subset"])
def test_a_probe_on_a_part_equals_one_on_a_store_of_that_part(store, tmp_path, how):
    """To the bit, for mini-batches and for full batches, since the order of an epoch follows from the number of rows."""
    labels = digits()["train"][1]
    rows = (
        draw_rows(labels, CLASSES, label_fraction=0.1)
        if how == "label_fraction"
        else draw_rows(labels, CLASSES, None, 4)
    )
    given = {"label_fraction": 0.1, "shots": 4, "subset": lines(store, tmp_path, rows[::-1])}
    grid = {"probes": [group | {how: given[how]} for group in (SGD, FULL)]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    alone = featcache.train_probes({"probes": [SGD, FULL]}, store=part_of(tmp_path, rows), run=tmp_path / "alone")
    assert_same_probes(run, alone)
    for row, other in zip(run.scores, alone.scores, strict=True):
        assert row["split"] == "train" or [row[k] for k in ("value", "low", "high")] == [
            other[k] for k in ("value", "low", "high")
        ]
    (name,) = run.summary["samples"]
    assert name == {"label_fraction": "label_fraction 0.1, draw 0", "shots": "shots 4, draw 0"}.get(how, name)
    entry = run.summary["samples"][name]
    assert entry["images"] == len(rows) and (how != "subset" or name == f"subset list.txt#{entry['ids_sha256']}")


def test_several_labels(tmp_path):
    splits = {split: (ids, several(labels), values) for split, (ids, labels, values) in digits().items()}
    classes = [*CLASSES, "even"]
    store = write_features(tmp_path / "s.zarr", splits, classes)
    run = featcache.train_probes({"probes": [SGD | {"loss": "bce", "shots": 5}]}, store=store, run=tmp_path / "r")
    rows = draw_rows(splits["train"][1], classes, shots=5)
    alone = part_of(tmp_path, rows, splits, classes)
    assert_same_probes(
        run, featcache.train_probes({"probes": [SGD | {"loss": "bce"}]}, store=alone, run=tmp_path / "a")
    )


def test_parts_and_the_whole_train_in_one_grid_as_alone(store, tmp_path):
    """Probes share batches only with those of the same images."""
    groups = [SGD, SGD | {"shots": [2, 8], "draw": [0, 1]}, SGD | {"label_fraction": [0.05, 0.1]}]
    run = featcache.train_probes({"probes": groups}, store=store, run=tmp_path / "r")
    ids = list(find_probes(run.path))
    assert len(ids) == 7
    for number, probe in enumerate(load_probes(run.path, ids)):
        spec = probe.spec
        own = {name: getattr(spec, name) for name in ("shots", "label_fraction", "draw") if getattr(spec, name)}
        alone = featcache.train_probes({"probes": [SGD | own]}, store=store, run=tmp_path / str(number))
        assert torch.equal(load_probe(alone.path, spec.id).weights["fc0.weight"], probe.weights["fc0.weight"])


def test_streamed_parts_hold_their_rows_once(store):
    opened, rows = featcache.open_store(store), draw_rows(digits()["train"][1], CLASSES, label_fraction=0.05)
    rows = np.unique(np.concatenate([rows, [899, 900, 1299]]))
    values = np.concatenate([digits()[split][2] for split in ("train", "val")])[rows]
    source = Streamed(Input("layer4:pooled"), opened, ["train", "val"], 8, rows)
    pieces = list(source.pieces(0, 0, 0))
    assert len(pieces) > 3 and pieces[-1].last
    assert sorted(row for piece in pieces for row in piece.rows.tolist()) == list(range(len(rows)))
    for piece in pieces:
        assert np.array_equal(piece.values[piece.order].numpy(), values[piece.rows.numpy()])
    loaded = Input("layer4:pooled").load(opened, ["train", "val"], torch.device("cpu"), rows=rows)
    chunks = torch.cat(list(Input("layer4:pooled").chunks(opened, ["train", "val"], torch.device("cpu"), rows)))
    assert np.array_equal(loaded.numpy(), values) and np.array_equal(chunks.numpy(), values)
    assert rows_within(rows, 899, 901).tolist() == [0, 1]


def test_a_streamed_part_trains_on_its_rows_alone(store, tmp_path):
    """The order differs from that of a store of the part, whose chunks are others, so only the rows are the same."""
    grid = {"probes": [SGD | {"label_fraction": 0.5, "epochs": 20}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r", memory=60_000)
    (rows,) = run.summary["buffers"].values()
    assert rows and next(iter(run.summary["buffers"])) == "layer4:pooled, pooled first, label_fraction 0.5, draw 0"
    resident = featcache.train_probes(grid, store=store, run=tmp_path / "q")
    one, two = (r.row(r.scores[0]["probe"], "top1", "test")["value"] for r in (run, resident))
    assert abs(one - two) < 0.03 and one > 0.8
    whole = featcache.train_probes({"probes": [SGD | {"epochs": 20}]}, store=store, run=tmp_path / "w", memory=60_000)
    assert whole.summary["buffers"]["layer4:pooled, pooled first"]


def test_means_over_draws_and_seeds(store, tmp_path, command):
    grid = {"probes": [SGD | {"shots": [1, 4], "draw": [0, 1, 2], "seed": [0, 1]}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    with open(run.path / "seeds.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["split"] == "test" and r["metric"] == "top1"]
    assert [r["shots"] for r in rows] == ["1", "4"] and {r["n"] for r in rows} == {"6"}
    assert sorted(rows[0]["draws"].split()) == list("001122")
    for row in rows:
        values = [run.row(probe, "top1", "test")["value"] for probe in row["probes"].split()]
        assert float(row["mean"]) == pytest.approx(np.mean(values))
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1))
    columns, table = score_rows(run)
    assert columns[-1] == "test top-1 % over seeds and draws" and "draw" in columns and "shots" in columns
    assert {line[-1].rpartition(" ")[2] for line in table} == {"(6)"}
    code, _, err = command("report", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0, err
    assert featcache.verify(run.path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_fraction": 0.001}, "probes[0].label_fraction: a share of 0.001 holds no image of class"),
        ({"shots": 500}, "probes[0].shots: 500 images of each class are asked for, and class"),
        ({"label_fraction": 1.0}, "probes[0].label_fraction: 1.0 is not a number above 0 and below 1"),
        ({"shots": 0}, "probes[0].shots: 0 is not a whole number of at least 1"),
        ({"shots": 1, "label_fraction": 0.1}, "label_fraction and shots both say which images to train on: give one"),
        ({"draw": 1}, "draw is the seed of label_fraction or shots: without them there is nothing to draw"),
        ({"subset": "nowhere.txt"}, "probes[0].subset: file not found: nowhere.txt"),
        ({"subset": "a\0b"}, "probes[0].subset: 'a\\x00b' is not the path of a file"),
        ({"subset": "."}, "probes[0].subset: cannot read .: [Errno 21] Is a directory"),
        ({"fold": "1/5"}, "probes[0].fold: unknown field"),
        ({"refit": "train"}, "probes[0].refit: unknown field"),
    ],
)
def test_what_is_refused(store, tmp_path, change, message):
    with pytest.raises(BadInput) as caught:
        featcache.train_probes({"probes": [SGD | change]}, store=store, run=tmp_path / "r")
    assert message in caught.value.message and "\n" not in caught.value.message
    assert not (tmp_path / "r").exists()


def test_choosing_on_train_would_look_at_labels_that_are_not_there(store, tmp_path):
    grid = {"select": {"split": "train"}, "probes": [SGD | {"shots": 2}]}
    with pytest.raises(BadInput, match="would choose by labels that the probe may not see"):
        featcache.train_probes(grid, store=store, run=tmp_path / "r")


def test_a_list_that_changes_is_another_subset(store, tmp_path):
    grid = {"probes": [SGD | {"subset": lines(store, tmp_path, range(200))}]}
    run = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    lines(store, tmp_path, range(300))
    grown = featcache.train_probes(grid, store=store, run=tmp_path / "r")
    assert len({row["probe"] for row in grown.scores}) == 2 and len(grown.summary["samples"]) == 2
    assert run.summary["samples"].items() < grown.summary["samples"].items()
    assert json.loads((run.path / "run.json").read_text())["samples"] == grown.summary["samples"]


def test_samples_are_made_once_and_by_name(store):
    opened = featcache.open_store(store)
    sets = TrainingSets(opened, {"train": ("train",)}, torch.device("cpu"))
    assert sets[Sample(shots=3)] is sets[Sample(shots=3)] and len(sets[Sample(shots=3)]) == 30
    held = [sets[Sample(shots=3, fold=f"{n}/3")] for n in (1, 2, 3)]
    assert sorted(np.concatenate([fold.held_out for fold in held])) == sets[Sample(shots=3)].rows.tolist()
    assert all(set(fold.rows) | set(fold.held_out) == set(sets[Sample(shots=3)].rows) for fold in held)
