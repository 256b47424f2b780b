"""Insertion and deletion against a loop, their level of chance, and what they cost; sanity checks with random weights."""

import csv
import re

import numpy as np
import pytest
import torch
from explaining import batch_of
from torchvision.transforms.functional import gaussian_blur

import featcache
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.reading import Reading
from featcache.attribution.scores.deletion import Deletion
from featcache.attribution.scores.insertion import Insertion
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.extraction.images import load_input
from featcache.feature import Feature
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import store_of

SIZE, STEPS = 64, 7
LAYER4, LAYER3 = (Reading((Feature(layer, "spatial"),)) for layer in ("layer4", "layer3"))
GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.5}},
        {"features": "layer3:spatial", "head": {"type": "mlp", "hidden": 8}, "loss": "bce", "epochs": 2,
         "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip


@pytest.fixture
def words(run, scenes, checkpoint):
    """Words of a command line that explains all its probes."""
    chosen = [word for row in featcache.open_run(run).scores for word in ("--probe", row["probe"])]
    backbone = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--device", "cpu"]
    return ["attribute", "--run", run, *chosen, *backbone]


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return load_backbone(checkpoint, size=SIZE)


@pytest.fixture(scope="module")
def images(scenes, backbone):
    """Three normalised test images [3, 3, 64, 64]."""
    records = read_dataset("voc", scenes, ["test"]).splits["test"][:3]
    return backbone.preprocessing.normalise(torch.stack([load_input(r, backbone.preprocessing) for r in records]))


@pytest.fixture(scope="module")
def heads(trained):
    """The probes' heads with the features that they read."""
    probes = [load_probe(trained.path, row["probe"]) for row in trained.scores[:: len(trained.scores) // 3]]
    features = [LAYER3 if "layer3" in str(probe.spec.features) else LAYER4 for probe in probes]
    modules = [HeadModule(probe.spec.head, probe.weights, probe.spec.loss.link) for probe in probes]
    return list(zip(modules, features, strict=True))


def table(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def area_by_loop(backbone, head, feature, label, start, end, order):
    """The area under the probabilities while pixels change in order."""
    variants, shares = [], []
    for step in range(STEPS + 1):
        count, image = round(step * SIZE * SIZE / STEPS), start.clone()
        image.view(3, -1)[:, order[:count]] = end.reshape(3, -1)[:, order[:count]]
        variants.append(image)
        shares.append(count / SIZE**2)
    maps = feature.of_images(backbone, torch.stack(variants))
    return float(np.trapezoid(head.probabilities(maps)[:, label].double(), shares))


@pytest.mark.parametrize("score", [Insertion(steps=STEPS), Deletion(steps=STEPS)])
def test_against_a_loop(score, backbone, images, heads):
    """With classes of several images, layers and losses, and ties that a random order breaks."""
    classes = [[1, 4], [0, 9], [3, 2]]
    batch = batch_of(backbone, LAYER4, images, classes)
    judge = score.judge(batch, heads)
    maps = torch.randn(6, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    maps[3] = 2.5
    for number, (head, feature) in list(enumerate(heads))[1:]:
        values, levels = judge(maps, number)
        assert values.dtype == levels.dtype == torch.float64
        for at in (1, 2, 5):
            image = images[at // 2]
            blurred, nothing = gaussian_blur(image, [11, 11], [5.0, 5.0]), torch.zeros_like(image)
            start, end = (blurred, image) if isinstance(score, Insertion) else (image, nothing)
            label, random = classes[at // 2][at % 2], score._order(at // 2, SIZE)
            ties = torch.empty(SIZE**2, dtype=torch.long)
            ties[random] = torch.arange(SIZE**2)
            order = torch.from_numpy(np.lexsort((ties.numpy(), -maps[at].flatten().numpy())))
            expected = area_by_loop(backbone, head, feature, label, start, end, order)
            assert values[at].item() == pytest.approx(expected, abs=1e-6)
            if at == 1:
                level = area_by_loop(backbone, head, feature, label, start, end, random)
                assert levels[at].item() == pytest.approx(level, abs=1e-6)
        assert values[3].isnan() and not levels.isnan().any(), "a constant map has no order"
    # A map that falls in the random order scores what chance scores, which the step of the curve shows.
    ranks = torch.empty(6, SIZE**2)
    for at in range(6):
        ranks[at, score._order(at // 2, SIZE)] = -torch.arange(SIZE**2).float()
    values, levels = judge(ranks.view(6, SIZE, SIZE), 0)
    torch.testing.assert_close(values, levels, rtol=0, atol=1e-6)


def test_faithfulness_from_the_command_line(run, words, store, command):
    """Every labelled class is explained by default; what a dry run counts is what it takes; the report shows it."""
    line = [*words, "--method", "gradcam,gradient", "--protocol", "faithfulness", "--limit", 3]
    code, out, err = command(*line, "--dry-run")
    assert code == 0 and "insertion " in out and "deletion " in out, err
    (counts,) = re.findall("through the backbone: (.*); nothing", out)
    pairs = int((featcache.open_store(store)["test"].labels == 1)[:3].sum())
    assert counts.startswith(f"{3 + 2 * (3 * 51 + pairs * 3 * 2 * 49):,} forward and {pairs * 3} backward;")
    code, out, err = command(*line, "--score", "insertion:steps=5,deletion:steps=4,compactness")
    assert code == 0 and "insertion %" in out and "deletion %" in out, err
    rows = table(run)
    assert len(rows) == 2 * 3 * pairs and {row["region_pixels"] for row in rows} == {"0.0"}
    for row in rows:
        for name in ("insertion", "deletion"):
            assert 0 <= float(row[f"{name}_uniform"]) <= 1 and (row[name] == "" or 0 <= float(row[name]) <= 1)
    same = {(row["probe"], row["id"], row["class"], row["deletion_uniform"]) for row in rows}
    assert len(same) == 3 * pairs, "the level of chance does not depend on the method"
    by_loss = {row["loss.type"]: row["probe"] for row in featcache.open_run(run).scores if row["head.type"] == "linear"}
    both = ["--probe", by_loss["bce"], "--probe", by_loss["ce"], "--method", "gradient"]
    code, out, err = command("compare", "--run", run, "--localisation", *both)
    assert code == 0 and "insertion %" in out and "one probe gives a softmax, the other sigmoids" in err, err
    code, _, err = command("report", "--run", run, "--out", run / "page.html")
    assert code == 0 and "lower is better" in (run / "page.html").read_text(), err
    code, _, err = command(*words, "--protocol", "faithfulness", "--score", "epg")
    assert code == 2 and "--score epg looks at boxes or masks, and --protocol faithfulness has neither" in err


def test_a_random_backbone_stands_beside_each_probe(run, words, scenes, checkpoint, command, tmp_path):
    """Its maps are those of the probe's own head on a network with random weights; they cost what is said."""
    line = [*words, "--method", "gradcam,gradient", "--sanity", "--limit", 4, "--seed", 3]
    code, out, err = command(*line, "--dry-run")
    assert code == 0 and "maps that no store has" in out, err
    (counts,) = re.findall("through the backbone: (.*); nothing", out)
    code, out, err = command(*line)
    assert code == 0 and f"through the backbone: {counts}\n" in err, (counts, err)
    assert out.count("gradcam (random backbone)") == 3 and out.count("gradient (random head)") == 3
    rows, store = table(run), store_of(featcache.open_run(run))
    random, records = load_backbone("random", arch="resnet18", seed=3, size=SIZE), read_dataset("voc", scenes, ["test"])
    by_id = {record.id: record for record in records.splits["test"]}
    for row in (row for row in rows if row["method"] == "gradcam (random backbone)"):
        probe = load_probe(run, row["probe"])
        feature = LAYER3 if "layer3" in str(probe.spec.features) else LAYER4
        image = random.preprocessing.normalise(load_input(by_id[row["id"]], random.preprocessing)[None])
        maps = feature.of_images(random, image)
        label = torch.tensor([store.classes.index(row["class"])])
        values = upsample(GradCAM().small(HeadModule(probe.spec.head, probe.weights), maps, label), SIZE).clamp(min=0)
        record = by_id[row["id"]]
        own = (record.box_classes == label.item()) & ~record.box_difficult
        inside = np.zeros((SIZE, SIZE), bool)
        for x0, y0, x1, y1 in record.boxes[own] * np.array([SIZE / record.width, SIZE / record.height] * 2):
            centres = np.arange(SIZE) + 0.5
            inside |= ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))[None]
        expected = values[0].numpy()[inside].sum() / values.sum().item() if values.sum() else None
        assert (float(row["epg"]) if row["epg"] else None) == (pytest.approx(expected, abs=1e-4) if expected else None)
    # From the store alone the images are enough, since the data set says what to draw maps from.
    code, out, err = command(*words[: words.index("--backbone")], "--sanity", "--limit", 2, *words[-6:-2])
    assert code == 0 and "gradcam (random backbone)" in out and "random backbones need" not in err, err
    code, out, err = command(*words[: words.index("--backbone")], "--sanity", "--limit", 2)
    assert code == 0 and "random backbone" not in out and "random backbones need the images" in err
