"""The grid pointing game: grids, their maps and scores, and what it cannot be played on."""

import csv
import json
import re

import numpy as np
import pytest
import torch

import featcache
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.gradcam import GradCAM
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.extraction.images import load_input
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import find_probes, load_probe

SIZE = 32
GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 3, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(scenes, tmp_path_factory):
    """The scenes with the class of their first box as their only label."""
    data, rows = read_dataset("voc", scenes), []
    for split, records in data.splits.items():
        rows += [{"path": str(r.image), "label": data.classes[r.box_classes[0]], "split": split} for r in records]
    path = tmp_path_factory.mktemp("single") / "single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(manifest, checkpoint, tmp_path_factory):
    """A finished single-label run."""
    place = tmp_path_factory.mktemp("gridpg")
    store = featcache.extract(
        checkpoint, "manifest", root=manifest, features="pooled,spatial", size=SIZE, dtype="float32", device="cpu",
        workers=0, batch_size=8, store=place / "s.zarr",
    )  # fmt: skip
    return featcache.train_probes(GRID, store=store, run=place / "r")


@pytest.fixture
def words(manifest, checkpoint, run):
    backbone = ["--backbone", checkpoint, "--dataset", "manifest", "--root", manifest, "--device", "cpu"]
    return ["attribute", "--run", run, *backbone]


def table(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_gridpg_from_the_command_line(trained, manifest, checkpoint, words, run, command, tmp_path):
    """The energy in its own cell of a map of the whole grid, recomputed; every pass counted; the same grids for all."""
    line = [*words, "--method", "gradcam,input_x_gradient,rise:masks=3", "--protocol", "gridpg:side=2:grids=3"]
    code, out, err = command(*line, "--dry-run")
    assert code == 0 and "maps that no store has" in out, err
    (counts,) = re.findall("through the backbone: (.*); nothing", out)
    code, out, err = command(*line)
    assert code == 0 and f"through the backbone: {counts}\n" in err, (counts, err)
    rows = table(run)
    assert len(rows) == 3 * 2 * 3 * 4 and {row["box_share"] for row in rows} == {"0.25"}
    assert {row["split"] for row in rows} == {"test, 2x2 grids"}
    assert len({tuple(r["id"] for r in rows if r["probe"] == p) for p in {row["probe"] for row in rows}}) == 1
    first = next(row for row in rows if row["method"] == "gradcam")
    cells = [
        row for row in rows if (row["probe"], row["method"], row["id"]) == (first["probe"], "gradcam", first["id"])
    ]
    assert len({row["class"] for row in cells}) == 4
    records = {record.id: record for record in read_dataset("manifest", manifest).splits["test"]}
    backbone = load_backbone(checkpoint, size=SIZE)
    pictures = [load_input(records[i], backbone.preprocessing) for i in first["id"].partition(": ")[2].split()]
    grid = torch.cat([torch.cat(pictures[:2], 2), torch.cat(pictures[2:], 2)], 1)
    maps = backbone(backbone.preprocessing.normalise(grid[None]), [Feature("layer4", "spatial")])["layer4:spatial"]
    assert maps.shape[2:] == (2, 2)
    probe, classes = load_probe(run, first["probe"]), featcache.open_store(trained.summary["store"]).classes
    head = HeadModule(probe.spec.head, probe.weights)
    for number, row in enumerate(cells):
        map_ = upsample(GradCAM().small(head, maps, torch.tensor([classes.index(row["class"])])), 2 * SIZE)[0].clamp(
            min=0
        )
        y, x = (SIZE * at for at in divmod(number, 2))
        expected = float(map_[y : y + SIZE, x : x + SIZE].sum() / map_.sum())
        assert float(row["epg"] or "nan") == pytest.approx(expected, abs=1e-4, nan_ok=True)
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0, err
    kept = np.load(run / "attribution.npz")
    assert kept["images"].shape == (3, 2 * SIZE, 2 * SIZE, 3) and len(kept["boxes"]) == 12


def test_grids_are_drawn_from_a_seed(words, run, command):
    seen = []
    for seed in (0, 0, 1):
        code, _, err = command(*words, "--protocol", f"gridpg:side=2:grids=4:seed={seed}", "--examples", 0)
        assert code == 0, err
        seen.append([row["id"] for row in table(run)])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("protocol", "without", "message"),
    [
        ("gridpg:side=4", 0, "a grid of 4 x 4 needs 16 classes, and split test has images of "),
        ("gridpg", 6, "--protocol gridpg runs the backbone: give --backbone, --dataset and --root"),
        ("gridgp", 0, "--protocol: unknown protocol 'gridgp'; did you mean 'gridpg'?"),
        ("gridpg:side=1", 0, "--protocol gridpg:side=1: side: input should be greater than or equal to 2"),
        ("boxes", 0, "has no box to score against"),
    ],
)
def test_what_it_cannot_be_played_on(words, command, protocol, without, message):
    given = words[:3] if without else words
    code, _, err = command(*given, "--protocol", protocol)
    assert code == 2 and message in err.splitlines()[-1], err


def test_multi_label_images_are_refused(store, scenes, checkpoint, command, tmp_path):
    run = featcache.train_probes({"probes": [GRID["probes"][0]]}, store=store, run=tmp_path / "r")
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes]
    code, _, err = command("attribute", "--run", run.path, *backbone, "--protocol", "gridpg:side=2")
    assert code == 2 and "needs images of one class each" in err


def test_images_that_every_probe_is_sure_of(trained, words, command, tmp_path):
    """Training images, their probabilities recomputed from the store; the same grids for all, named by what they are."""
    store = featcache.open_store(trained.summary["store"])
    longer = GRID["probes"][0] | {"epochs": 40, "batch_size": 8}
    run = featcache.train_probes({"probes": [longer]}, store=store.path, run=tmp_path / "longer").path
    split = store["train"]
    lowest = np.ones(len(split))
    for probe in find_probes(run):
        own = load_probe(run, probe)
        logits = torch.from_numpy(split["pooled"][:]) @ own.weights["fc0.weight"].T + own.weights["fc0.bias"]
        shares = logits.softmax(1) if own.spec.loss.type == "ce" else logits.sigmoid()
        for number, label in enumerate(split.labels):
            right = bool(shares[number].argmax() == label)
            lowest[number] = min(lowest[number], float(shares[number, label]) * right)
    least = round(float(np.quantile(lowest, 0.3)), 3)
    sure = lowest >= least
    names = {split.ids[number] for number in np.flatnonzero(sure)}
    classes = len(set(split.labels[sure].tolist()))
    assert 4 <= classes and len(names) < len(split)
    line = ["attribute", "--run", run, *words[3:], "--split", "train", "--examples", 0, "--protocol"]
    sets = []
    for method in ("gradcam", "layercam"):
        code, out, err = command(*line, f"gridpg:side=2:grids=20:confidence={least}", "--method", method)
        assert code == 0 and f"20 grids of {len(names)} images of {classes} classes" in out, err
        assert {name for row in table(run) for name in row["id"].partition(": ")[2].split()} <= names
        sets.append(json.loads((run / "attribution.json").read_bytes())["set"])
    assert sets[0] == sets[1]
    code, _, err = command(*line, "gridpg:side=2:confidence=0.99999")
    assert code == 2 and "that every explained probe is sure of (" in err and "a lower confidence" in err
    # Published: a softmax whatever the loss, and 0.95.
    code, out, err = command(*line, "gridpg:side=2:grids=3", "--parity", "how-to-probe")
    assert (code == 0 and "confidence=0.95" in out) or "every explained probe is sure of" in err, err


def test_a_run_without_boxes_is_pointed_to_grids(words, run, command):
    code, _, err = command(*words[:3])
    assert code == 2 and "has no boxes, so grids of its images are explained (--protocol gridpg)" in err
    assert "give --backbone, --dataset and --root" in err
    code, out, err = command(*words, "--limit", 2)
    assert code == 0 and "--protocol gridpg:side=2" in err and "2x2 grids" not in out, err
    assert {row["split"] for row in table(run)} == {"test, 2x2 grids"}
