"""Probes of a vision transformer: on its class token, on its tokens, on features side by side; and grids."""

import csv
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from vits import tiny_vit

import featcache
from featcache.attribution.batch import Source, open_network, open_records
from featcache.attribution.protocols.gridpg import _laid_out
from featcache.attribution.reading import Reading
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.exchange.merged import Merged
from featcache.extraction.images import load_input
from featcache.feature import Feature
from featcache.probes.runs.probe_file import load_probe

SIDE = 32
TRAINED = {"loss": "bce", "epochs": 2, "batch_size": 16, "optimizer": {"type": "sgd", "lr": 0.1}}
GRID = {
    "probes": [
        TRAINED | {"features": ["cls", "patch_mean", "cls + patch_mean", "last-1:spatial + spatial", "grid(2,2,0)"], "head": "linear"},
        TRAINED | {"features": "tokens", "head": {"type": "attentive", "heads": 2}},
    ]
}  # fmt: skip
EVERYWHERE = "gradient,input_x_gradient,smoothgrad:samples=2,intgrad:steps=2,occlusion,rise:masks=3,lime:samples=3"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(tiny_vit(SIDE, num_heads=1).trunk.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(scenes, vit, tmp_path_factory):
    """A run with a probe of each feature."""
    place = tmp_path_factory.mktemp("transformers")
    store = featcache.extract(
        vit, "voc", root=scenes, features="cls,patch_mean,spatial,last-1:spatial,grid(2,2,0),tokens", size=SIDE,
        dtype="float32", device="cpu", workers=0, store=place / "s.zarr",
    )  # fmt: skip
    return featcache.train_probes(GRID, store=store, run=place / "r")


@pytest.fixture
def words(trained, vit, scenes, tmp_path):
    """A command line on a copy of the run."""
    shutil.copytree(trained.path, tmp_path / "r")
    backbone = ["--backbone", vit, "--dataset", "voc", "--root", scenes, "--device", "cpu"]
    return ["attribute", "--run", tmp_path / "r", *backbone, "--limit", 2]


def probes_of(trained):
    return {row["features"]: row["probe"] for row in trained.scores}


def chosen(trained, *features):
    ids = probes_of(trained)
    return [word for feature in features for word in ("--probe", ids[feature])]


def rows_of(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_methods_that_run_the_backbone_explain_probes_of_any_feature(trained, words, command):
    methods = ["--method", EVERYWHERE + ",attnlrp"]
    every = chosen(trained, *probes_of(trained))
    code, out, err = command(*words, *every, *methods, "--dry-run")
    assert code == 0, err
    (counts,) = re.findall("through the backbone: (.*); nothing", out)
    code, _, err = command(*words, *every, *methods)
    assert code == 0 and f"through the backbone: {counts}\n" in err, (counts, err)
    rows = rows_of(words[2])
    assert len({(row["probe"], row["method"]) for row in rows}) == 6 * 8
    assert all(0 <= float(row["epg"]) <= 1 for row in rows if row["epg"])


def test_a_backbone_known_by_its_tensors_alone_is_drawn_for_a_sanity_check(trained, words, command):
    code, _, err = command(*words, *chosen(trained, "norm:cls"), "--method", "gradient", "--sanity")
    assert code == 0, err
    assert {row["method"] for row in rows_of(words[2])} == {
        "gradient",
        "gradient (random head)",
        "gradient (random backbone)",
    }
    without = words[: words.index("--backbone")] + words[words.index("--dataset") :]
    code, _, err = command(*without, *chosen(trained, "norm:patch_mean"), "--sanity")
    assert code == 2 and "--sanity draws a backbone like the store's: give --backbone too" in err


def test_their_maps_are_of_the_merged_network(trained, words, vit, scenes, command):
    """Input x gradient, and the means of features side by side as the maps that they are the means of."""
    backbone, scene = load_backbone(vit, size=SIDE), read_dataset("voc", scenes, ["test"])
    code, _, err = command(*words, *chosen(trained, *probes_of(trained)), "--method", "input_x_gradient")
    assert code == 0, err
    kept = np.load(words[2] / "attribution.npz")
    records = {record.id: record for record in scene.splits["test"]}
    for panel, made in zip(kept["panels"], kept["maps"], strict=True):
        probe, _, _, image, name = panel[:5]
        inputs = backbone.preprocessing.normalise(load_input(records[image], backbone.preprocessing)[None])
        inputs.requires_grad_()
        logit = Merged(backbone, load_probe(trained.path, probe))(inputs)[0, scene.classes.index(name)]
        (gradient,) = torch.autograd.grad(logit, inputs)
        expected = (inputs * gradient).sum(1)[0].detach()
        torch.testing.assert_close(torch.tensor(made), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_methods_on_maps_explain_what_has_positions(trained, words, command):
    methods = ["--method", "gradcam,gradcampp,layercam,position_logits,cached_occlusion,scorecam"]
    code, _, err = command(
        *words, *methods, *chosen(trained, "norm:patch_mean", "blocks.1+norm:spatial + norm:spatial")
    )
    assert code == 0 and len({(row["probe"], row["method"]) for row in rows_of(words[2])}) == 2 * 6, err
    code, _, err = command(*words, "--method", "attention_rollout", *chosen(trained, "norm:patch_mean", "norm:cls"))
    assert code == 0, err


@pytest.mark.parametrize(
    ("method", "feature", "message"),
    [
        ("gradcam", "norm:cls", "reads norm:cls, which is no map of the image; methods that can explain it: gradient, "),
        ("position_logits", "norm:tokens", "has a head of type attentive that brings the positions together before its"),
        ("scorecam", "norm:cls + norm:patch_mean", "reads norm:cls + norm:patch_mean, which is no map of the image"),
        ("attention_rollout", "norm:tokens", "reads norm:tokens, which is neither one class token nor the patches of one"),
        ("lrp", "norm:cls", "has VisionTransformer modules, which its rules do not fit: LRP serves ResNets, "),
        ("deeplift", "norm:cls", "has non-linear parts without a rule: its contributions do not sum to its change"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_explain_is_one_line(trained, words, command, method, feature, message):
    code, _, err = command(*words, "--method", method, *chosen(trained, feature))
    assert code == 2 and message in err.splitlines()[-1], err


@pytest.mark.parametrize("positions", ["resized", "of one size"])
def test_grids_are_larger_than_the_images(vit, positions, tmp_path, scenes):
    """Positions are resized from the checkpoint's, as the family does at load."""
    store = featcache.open_store(
        featcache.extract(vit, "voc", root=scenes, features="cls", size=SIDE, workers=0, splits=["test"], store=tmp_path / "s.zarr")
    )  # fmt: skip
    backbone, device = load_backbone(vit, size=SIDE), torch.device("cpu")
    records = open_records(store["test"], "voc", scenes)
    network = open_network(store["test"], backbone.preprocessing, device, records, vit, None, None, 0)
    read = (Reading((Feature("norm", "cls"),)),)
    source = Source(store["test"], backbone.preprocessing, device, network, read, 2e9)
    if positions == "of one size":
        source = replace(source, network=replace(network, at_size=lambda size: backbone))
        with pytest.raises(
            BadInput, match="takes no images of 64 pixels, as a grid of 2 x 2 has; it needs a backbone of"
        ):
            _laid_out(source, 2, [(0, 1, 2, 3)], network.picture)
        return
    laid_out = _laid_out(source, 2, [(0, 1, 2, 3)], network.picture)
    own = load_backbone(vit, size=2 * SIDE)
    assert laid_out.backbone.weights_sha256 == own.weights_sha256 != backbone.weights_sha256
    with torch.no_grad():
        tokens = laid_out.backbone.run(laid_out.inputs([0]))
        expected = own.run(own.preprocessing.normalise(laid_out._network.picture(0)[None]))
    torch.testing.assert_close(tokens, expected)
    assert tokens.shape[1] == 1 + 4 + 64
