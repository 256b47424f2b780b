"""Maps against captum and the backbone; EPG by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from captum.attr import InputXGradient as InputXGradient_
from captum.attr import LayerGradCam
from explaining import explain
from torch import nn
from torchvision.models import resnet18

import featcache
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.scores.epg import EPG
from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import select
from featcache.reporting.localisation import _mean_with_interval

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "optimizer": {"type": "sgd", "lr": 0.5}},
        {"features": "spatial", "head": {"type": "mlp", "hidden": 16}, "loss": "bce", "epochs": 3, "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run with linear and MLP probes."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


class Whole(nn.Module):
    """The plain torchvision network up to layer4, then a probe's head: what the cache stands for."""

    def __init__(self, checkpoint, head):
        super().__init__()
        network = resnet18()
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
        parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.trunk = nn.Sequential(*(getattr(network, n) for n in parts))
        for module in self.trunk.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.head = head

    def forward(self, images):
        return self.head(self.trunk(images))


@pytest.fixture(scope="module")
def images(scenes):
    """Normalised test images [8, 3, 64, 64] as the backbone sees them."""
    preprocessing = load_backbone("random", arch="resnet18", size=64).preprocessing
    records = read_dataset("voc", scenes, ["test"]).splits["test"][:8]
    return preprocessing.normalise(torch.stack([preprocessing.apply(open_image(r.image)) for r in records]))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_gradcam_from_the_cache_equals_gradcam_through_the_backbone(run, store, checkpoint, images, number):
    probe = load_probe(run.path, [r["probe"] for r in run.scores][3 * number])
    head = HeadModule(probe.spec.head, probe.weights)
    classes = torch.arange(8)
    cached = torch.from_numpy(featcache.open_store(store)["test"]["spatial"][:8])
    got = GradCAM().small(head, cached, classes)
    model = Whole(checkpoint, head).eval()
    oracle = LayerGradCam(model, model.trunk[-1]).attribute(images.requires_grad_(), classes, relu_attributions=False)
    scale = oracle.abs().max()
    torch.testing.assert_close(got / scale, oracle[:, 0].detach() / scale, rtol=1e-4, atol=2e-5)
    enlarged = nn.functional.interpolate(oracle, (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(upsample(got, 64) / scale, enlarged.detach() / scale, rtol=1e-4, atol=2e-5)


def test_input_x_gradient_equals_captum(run, checkpoint, images):
    probes = [load_probe(run.path, p) for p in dict.fromkeys(r["probe"] for r in run.scores)]
    # In float64: at a pre-activation of nearly zero, rounding would decide which way a ReLU goes.
    heads = [HeadModule(p.spec.head, p.weights).double() for p in probes]
    backbone, images = load_backbone(checkpoint, size=64).double(), images.detach().double()
    classes = [(1, 2), (3, 0), (9, 9), (4, 1)]
    got = explain(InputXGradient(), backbone, Feature("layer4", "spatial"), heads, images[:4], classes)
    for number, head in enumerate(heads):
        model = Whole(checkpoint, head).double().eval()
        for image, own in enumerate(classes):
            for at, label in enumerate(own):
                oracle = InputXGradient_(model).attribute(images[image : image + 1].requires_grad_(), label)
                expected = oracle.sum(1)[0].detach()
                torch.testing.assert_close(got[number, image, at].double(), expected, rtol=1e-5, atol=1e-6)


def test_epg_by_hand():
    #  2  -5 | box covers the left column: (2 + 1) / (2 + 1 + 3), the negative counts as nothing.
    #  1   3 |
    maps = torch.tensor([[[2.0, -5.0], [1.0, 3.0]], [[-1.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [7.0, 0.0]]])
    mask = torch.tensor([[True, False], [True, False]]).expand(3, 2, 2)
    values = EPG().measure(maps, mask).tolist()
    assert values[0] == pytest.approx(0.5) and np.isnan(values[1]) and values[2] == 1


def squashed_mask(boxes, height, width, size):
    """The mask of boxes in an image of height x width, squashed to size x size."""
    squash = Preprocessing(size, (0, 0, 0), (1, 1, 1))
    return box_mask(squash.map_boxes(boxes, height, width)[0], size)


def test_box_masks_by_hand():
    # A 200 x 100 image squashed to 10 x 10: one pixel is 20 wide and 10 high.
    mask = squashed_mask([(40, 20, 100, 50)], 100, 200, 10)
    assert mask.nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)]
    both = squashed_mask([(40, 20, 100, 50), (0, 0, 60, 30)], 100, 200, 10)
    assert int(both.sum()) == 9 + 9 - 1, "a union counts no pixel twice"
    assert squashed_mask([(0, 0, 200, 100)], 100, 200, 10).all()
    assert not squashed_mask([(41, 21, 49, 24)], 100, 200, 10).any(), "a box that holds no pixel's centre"
    assert not squashed_mask([], 100, 200, 10).any()


def test_a_uniform_map_scores_the_boxes_share():
    mask = squashed_mask([(0, 0, 50, 50)], 100, 100, 20)
    assert EPG().measure(torch.ones(1, 20, 20), mask[None]).item() == pytest.approx(0.25)


def attribute_words(run, *more):
    return ["attribute", "--run", run, *more]


def test_the_interval_of_epg_holds_its_mean_and_that_of_other_images():
    """Of images with one to three maps each, whose energies go together."""
    random, rows = np.random.default_rng(0), []
    for _ in range(400):
        images = [(i, random.beta(2, 3)) for i in range(60) for _ in range(random.integers(1, 4))]
        rows.append(_mean_with_interval([{"id": i, "epg": (epg + i % 2) / 2} for i, epg in images], "epg"))
    mean, low, high = np.array(rows).T
    truth = (0.4 + 0.5) / 2
    assert ((0 <= low) & (low <= mean) & (mean <= high) & (high <= 1)).all()
    assert 0.92 <= ((low <= truth) & (truth <= high)).mean()
    one = _mean_with_interval([{"id": "a", "epg": 0.5}], "epg")
    assert one[0] == 0.5 and one[2] - one[1] > 0.7


def test_gradcam_needs_the_store_alone(run, scenes, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    code, out, _ = command(*attribute_words(tmp_path / "r", "--select", "best map per loss,head"))
    table, _, _ = out.partition("\n\n")
    assert code == 0 and table.count("gradcam") == 3 and "uniform map %" in table
    rows = (tmp_path / "r/attribution.csv").read_text().splitlines()
    boxes = featcache.open_store(run.summary["store"])["test"].boxes
    pairs = sum(len(np.unique(classes[~difficult])) for _, classes, difficult in boxes)
    assert rows[0] == "probe,method,split,id,class,epg,box_share,region_pixels" and len(rows) == 1 + 3 * pairs


def test_rows_are_the_epg_of_the_maps(run, store, tmp_path):
    """Recompute one probe's rows with loops."""
    shutil.copytree(run.path, tmp_path / "r")
    (probe,) = select(run, "best map")
    rows = featcache.attribute(tmp_path / "r", probes=[probe], limit=5, examples=0)
    trained, test = load_probe(run.path, probe), featcache.open_store(store)["test"]
    head, expected = HeadModule(trained.spec.head, trained.weights), []
    for row in range(len(test)):
        boxes, classes, difficult = test.boxes[row]
        height, width = test.sizes[row]
        wanted = sorted(set(classes[~difficult].tolist()))
        if wanted and len({i for i, *_ in expected}) < 5:
            for c in wanted:
                maps = upsample(
                    GradCAM().small(head, torch.from_numpy(test["spatial"][row : row + 1]), torch.tensor([c])), 64
                )[0]
                inside = total = 0.0
                for y in range(64):
                    for x in range(64):
                        value = max(float(maps[y, x]), 0)
                        total += value
                        inside += value * any(
                            b[0] <= (x + 0.5) * width / 64 < b[2] and b[1] <= (y + 0.5) * height / 64 < b[3]
                            for b in boxes[(classes == c) & ~difficult]
                        )
                expected.append(
                    (test.ids[row], featcache.open_store(store).classes[c], inside / total if total else np.nan)
                )
    assert [(r["id"], r["class"]) for r in rows] == [(i, c) for i, c, _ in expected]
    assert [r["epg"] for r in rows] == pytest.approx([e for *_, e in expected], abs=1e-5, nan_ok=True)


def test_both_methods_and_the_report(run, scenes, checkpoint, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes]
    code, out, _ = command(
        *attribute_words(tmp_path / "r", "--method", "gradcam,input_x_gradient", "--limit", 6, *backbone)
    )
    assert code == 0 and out.count("input_x_gradient") == 2
    kept = np.load(tmp_path / "r/attribution.npz", allow_pickle=False)
    assert kept["images"].shape == (6, 64, 64, 3) and kept["maps"].shape[1:] == (64, 64)
    assert len(kept["maps"]) == len(kept["panels"])
    code, out, _ = command("report", "--run", tmp_path / "r", "--run", run.path, "--out", tmp_path / "page.html")
    assert code == 0 and str(tmp_path / "page.html") in out
    page = (tmp_path / "page.html").read_text()
    sheets = len(kept["maps"]) // 4
    assert page.count("data:image/jpeg;base64") == 1 + sheets * 5, "the key; a photograph and four maps of each class"
    assert page.count("data:image/svg+xml;base64") == 4 and page.count("<img") == page.count('alt="')
    assert "left out" not in page and "more images and classes" not in page
    assert "chance" in page and "EPG" in page and run.summary["store_id"] in page
    for outside in ("http://", "https://", 'src="/'):
        assert outside not in page, "self-contained"


def test_what_the_store_was_not_made_of_is_refused(run, scenes, checkpoint, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    shutil.copytree(scenes, tmp_path / "scenes")
    method = ["--method", "input_x_gradient"]
    data = ["--dataset", "voc", "--root", tmp_path / "scenes"]
    code, _, err = command(*attribute_words(tmp_path / "r", *method))
    assert code == 2 and "give --backbone, --dataset and --root" in err
    code, _, err = command(
        *attribute_words(tmp_path / "r", *method, "--backbone", "random", "--arch", "resnet18", *data)
    )
    assert code == 2 and "made of something else: weights_sha256" in err
    image = tmp_path / "scenes/VOCdevkit/VOC2007/JPEGImages/000070.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    code, _, err = command(*attribute_words(tmp_path / "r", *method, "--backbone", checkpoint, *data))
    assert code == 2 and "made of something else: dataset test" in err
    assert not (tmp_path / "r/attribution.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gradcamm"], "unknown method 'gradcamm'; did you mean 'gradcam'?"),
        (["--probe", "0123456789"], "has no probe 0123456789"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--select", "best nap"], "did you mean 'map'"),
        (["--run", "nowhere"], "run nowhere not found"),
        (["--store", "nowhere.zarr"], "store not found"),
    ],
)
def test_wrong_words(run, command, words, message):
    code, _, err = command(*attribute_words(run.path, *words))
    assert code == 2 and message in err and "Traceback" not in err


def test_a_pooled_probe_needs_the_map_of_its_layer(checkpoint, scenes, tmp_path):
    store = featcache.extract(
        checkpoint, "voc", root=scenes, features="pooled", size=64, workers=0, store=tmp_path / "p.zarr"
    )
    run = featcache.train_probes({"probes": GRID["probes"][:1]}, store=store, run=tmp_path / "r")
    with pytest.raises(BadInput, match="holds no feature 'layer4:spatial'"):
        featcache.attribute(run.path)


def test_damaged_results_are_named(run, command, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    words = attribute_words(tmp_path / "r", "--limit", 3, "--method", "gradcam,gradcam")
    code, out, _ = command(*words)
    assert code == 0 and out.count("gradcam") == 2, "a method asked for twice is run once"
    for name in ("attribution.npz", "scores.csv"):
        file = tmp_path / "r" / name
        file.write_bytes(file.read_bytes()[:300])
        code, _, err = command("report", "--run", tmp_path / "r", "--out", tmp_path / "page.html")
        assert code == 2 and "damaged run " in err and name in err
        assert not (tmp_path / "page.html").exists()


def test_the_default_rule_is_that_of_the_task(scenes, checkpoint, tmp_path, command):
    """A single-label run with boxes, from extract to report without options."""
    data, rows = read_dataset("voc", scenes), []
    for split, records in data.splits.items():
        for record in records:
            name = data.classes[record.box_classes[0]]
            boxes = [{"box": record.boxes[0].tolist(), "label": name}]
            rows.append({"path": str(record.image), "label": name, "split": split, "boxes": boxes})
    manifest, store, grid = tmp_path / "single.jsonl", tmp_path / "s.zarr", tmp_path / "g.yaml"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--backbone", checkpoint, "--dataset", "manifest", "--root", manifest, "--size", 64, "--workers", 0]
    code, _, err = command("extract", *words, "--features", "pooled,spatial", "--store", store)
    assert code == 0, err
    grid.write_text(yaml.safe_dump({"probes": GRID["probes"][:1]}))
    run = tmp_path / "r"
    code, out, err = command("train-probes", "--grid", grid, "--store", store, "--run", run)
    assert code == 0 and "val top-1 %" in out, err
    code, out, err = command("attribute", "--run", run)
    assert code == 0, err
    chosen = select(featcache.open_run(run), "best top1 per loss")
    assert len(chosen) == 2 and all(probe in out for probe in chosen)
    code, _, err = command("report", "--run", run, "--out", tmp_path / "page.html")
    assert code == 0 and "Localisation" in (tmp_path / "page.html").read_text(), err


def test_maps_are_not_drawn_from_damaged_features(run, store, tmp_path, command):
    shutil.copytree(run.path, tmp_path / "r")
    shutil.copytree(store, tmp_path / "s.zarr")
    shard = tmp_path / "s.zarr/test/layer4.spatial/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[1] ^= 1
    shard.write_bytes(data)
    words = [*attribute_words(tmp_path / "r", "--limit", 3), "--store", tmp_path / "s.zarr"]
    code, _, err = command(*words)
    assert code == 2 and "damaged shard file" in err and "--repair" in err
    assert not (tmp_path / "r/attribution.csv").exists()
