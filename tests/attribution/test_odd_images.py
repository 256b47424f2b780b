"""Objects and maps that have no score: outside the crop, difficult, missing; empty maps, constant ones, and those that are not finite."""

import csv
import shutil
import zlib
from typing import Literal

import numpy as np
import pytest
import torch
from layouts import write_voc
from PIL import Image

import featcache
from featcache.attribution.methods import METHODS
from featcache.attribution.methods.method import Method
from featcache.attribution.scores import SCORES
from featcache.errors import BadInput
from featcache.reporting.localisation import MARK

# Of images of 60 x 50 pixels the crop does not show the first and last 8 columns.
OUTSIDE, INSIDE = (1, 1, 6, 50), (20, 10, 40, 40)
TEST = {
    "outside": [("dog", False, OUTSIDE)],
    "difficult": [("dog", True, INSIDE)],
    "both": [("dog", False, INSIDE), ("cat", False, OUTSIDE), ("dog", True, (41, 10, 50, 40))],
    "none": [],
}
GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1, "optimizer": {"type": "sgd", "lr": 0.5}}
    ]
}


class Flat(Method):
    """A map that says the same of all pixels, and nothing if `value` is not above zero."""

    type: Literal["flat"] = "flat"
    value: float = 0

    def explain(self, heads, feature, batch):
        return [torch.full((len(batch.targets), batch.size, batch.size), self.value) for _ in heads]


class Broken(Method):
    """A map with a value that is not finite, of one image."""

    type: Literal["broken"] = "broken"

    def explain(self, heads, feature, batch):
        maps = torch.zeros(len(batch.targets), batch.size, batch.size)
        maps[-1, 3, 4] = float("inf")
        return [maps for _ in heads]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The root of a VOC of such images, with masks that fill the boxes."""
    root = tmp_path_factory.mktemp("odd")
    home = write_voc(root, TEST, split="test")
    write_voc(root, {f"t{n}": [("dog", False, INSIDE), ("cat", n == 1, OUTSIDE)] for n in range(4)}, split="train")
    write_voc(root, {f"v{n}": [("dog", n > 0, INSIDE)] for n in range(2)}, split="val")
    for name, objects in TEST.items():
        indices = np.zeros((50, 60), np.uint8)
        for number, (_, _, (x0, y0, x1, y1)) in enumerate(objects, 1):
            indices[y0 - 1 : y1, x0 - 1 : x1] = number
        for kind in ("SegmentationObject", "SegmentationClass"):
            (home / kind).mkdir(exist_ok=True)
            Image.fromarray(indices).save(home / kind / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def trained(odd, tmp_path_factory):
    place = tmp_path_factory.mktemp("odd_run")
    store = featcache.extract(
        "random", "voc", root=odd, arch="resnet18", size=32, resize="crop", features="pooled,spatial", workers=0,
        store=place / "s.zarr",
    )  # fmt: skip
    return featcache.train_probes(GRID, store=store, run=place / "r")


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The folder of a copy, where two more methods are known."""
    for kind in (Flat, Broken):
        monkeypatch.setitem(METHODS._kinds, kind.word(), kind)
    shutil.copytree(trained.path, tmp_path / "r")
    return tmp_path / "r"


def table(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def explained(run):
    return [(row["id"], row["class"]) for row in table(run)]


def test_only_what_is_seen_and_not_difficult_is_explained(run, odd, command):
    data = ["--dataset", "voc", "--root", odd]
    code, _, err = command("attribute", "--run", run)
    assert code == 0 and explained(run) == [("both", "dog")], err
    boxes = table(run)
    code, _, err = command("attribute", "--run", run, "--protocol", "masks", *data)
    assert code == 0 and explained(run) == [("both", "dog")] and "notice: " not in err, err
    # The mask fills the box; the pixels of the difficult dog, which the crop shows in part, do not count.
    assert table(run)[0]["region_pixels"] == boxes[0]["region_pixels"]
    assert float(table(run)[0]["box_share"]) > float(boxes[0]["box_share"])
    backbone = ["--backbone", "random", "--arch", "resnet18", *data]
    words = ["--protocol", "faithfulness", "--score", "deletion:steps=2"]
    code, _, err = command("attribute", "--run", run, *backbone, *words)
    assert code == 0 and explained(run) == [("outside", "dog"), ("both", "cat"), ("both", "dog")], err


def test_a_split_of_difficult_objects_is_said(odd, tmp_path):
    shutil.copytree(odd, tmp_path / "data")
    home = tmp_path / "data/VOCdevkit/VOC2007"
    (home / "ImageSets/Main/test.txt").write_text("difficult\nnone\n")
    store = featcache.extract(
        "random", "voc", root=tmp_path / "data", arch="resnet18", size=32, features="spatial", workers=0,
        store=tmp_path / "s.zarr",
    )  # fmt: skip
    run = featcache.train_probes(
        {"probes": [GRID["probes"][0] | {"features": "spatial"}]}, store=store, run=tmp_path / "r"
    )
    with pytest.raises(BadInput, match="has no box to score against that is not difficult"):
        featcache.attribute(run.path)
    with pytest.raises(BadInput, match="no image of split test has a segmentation mask"):
        featcache.attribute(run.path, protocol="masks", dataset="voc", root=tmp_path / "data")
    with pytest.raises(BadInput, match="no image of split test has a label to explain"):
        featcache.attribute(run.path, protocol="faithfulness", scores=["compactness"])


def test_empty_and_constant_maps_are_counted(run, odd, command):
    """No score of a map that says nothing; a constant map scores what chance does, but has no order of pixels."""
    backbone = ["--backbone", "random", "--arch", "resnet18", "--dataset", "voc", "--root", odd]
    names = ",".join(f"{name}:steps=2" if "steps" in kind.model_fields else name for name, kind in SCORES.items())
    words = ["attribute", "--run", run, "--score", names, "--method", "flat,flat:value=2"]
    code, out, err = command(*words, *backbone)
    assert code == 0 and MARK in out, err
    empty, constant = table(run)
    for kind in SCORES.values():
        score, level = kind.columns
        assert empty[score] == ""
        if "steps" in kind.model_fields:
            assert constant[score] == ""
        elif kind.word() != "pointing_game":
            assert float(constant[score]) == pytest.approx(float(constant[level]), abs=1e-12)
    probe = empty["probe"]
    (first, *_) = featcache.compare_localisation(run, probes=[probe], methods=["flat", "flat:value=2.0"])
    assert (first.maps, first.empty) == (0, 1) and np.isnan([first.difference, first.p, *first.scores]).all()
    words = [
        "compare",
        "--run",
        run,
        "--localisation",
        "--probe",
        probe,
        "--method",
        "flat",
        "--method",
        "flat:value=2.0",
    ]
    code, out, err = command(*words)
    assert code == 0 and out.splitlines()[2].split()[2:4] == ["-", "-"], err


def test_images_smaller_than_a_cell_of_a_grid(tmp_path, command):
    """Every image is resized before it is laid into a grid; a class of a single pixel's images is explained like others."""
    for split in ("train", "val", "test"):
        for number, name in enumerate(("ant", "bee", "cow", "dog")):
            path = tmp_path / "images" / split / name / "1.png"
            path.parent.mkdir(parents=True)
            colour = tuple(zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3])
            Image.new("RGB", ((9, 5), (1, 1))[number % 2], colour).save(path)
    backbone = ["--backbone", "random", "--arch", "resnet18", "--dataset", "folder", "--root", tmp_path / "images"]
    words = ["--size", 32, "--features", "spatial", "--workers", 0]
    code, _, err = command("extract", *backbone, *words, "--store", tmp_path / "s.zarr")
    assert code == 0, err
    grid = GRID["probes"][0] | {"features": "spatial", "loss": "ce"}
    run = featcache.train_probes({"probes": [grid]}, store=tmp_path / "s.zarr", run=tmp_path / "r")
    line = ["attribute", "--run", run.path, *backbone, "--protocol", "gridpg:side=2:grids=2", "--method", "gradient"]
    code, _, err = command(*line)
    assert code == 0, err
    rows = table(run.path)
    assert len(rows) == 8 and all(row["box_share"] == "0.25" and row["region_pixels"] == "1024.0" for row in rows)


def test_a_map_that_is_not_finite_is_named(run, odd, command):
    words = ["attribute", "--run", run, "--method", "broken", "--probe", featcache.open_run(run).scores[0]["probe"]]
    line = "--method broken: the map of probe {} for class dog in image both has values that are not finite"
    code, _, err = command(*words)
    assert code == 2 and line.format(words[-1]) in err
    assert not (run / "attribution.csv").exists()
