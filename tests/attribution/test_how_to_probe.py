"""`--parity how-to-probe` against the published arithmetic, written slowly in tests/support/how_to_probe.py."""

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import how_to_probe as published
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, to_tensor

import featcache
from featcache.attribution.batch import Network, Source
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.guided_backprop import GuidedBackprop
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.methods.lrp import LRP
from featcache.attribution.profiles.how_to_probe import HowToProbe, smooth
from featcache.attribution.profiles.published_images import stretched
from featcache.attribution.protocols.boxes import Boxes
from featcache.attribution.protocols.gridpg import GridPG
from featcache.attribution.scores.box_iou import BoxIoU
from featcache.attribution.scores.compactness import Compactness
from featcache.attribution.scores.complexity import Complexity
from featcache.attribution.scores.epg import EPG
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe

PARITY = ("--parity", "how-to-probe")
SIDE = 66
GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 4, "optimizer": {"type": "sgd", "lr": 0.5}},
        {"features": "spatial", "head": {"type": "mlp", "hidden": 16}, "loss": "bce", "epochs": 3, "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip
BLUR = {GradCAM: published.mean_of_25, InputXGradient: published.gaussian_of_129}


@pytest.fixture(scope="module")
def maps():
    """A rough map, a smooth one, one without a positive value, one of zeros, and one so small that 1e-7 matters."""
    random = torch.Generator().manual_seed(0)
    rough = torch.randn(SIDE, SIDE, generator=random)
    wave = torch.sin(torch.arange(SIDE) / 9)[:, None] * torch.cos(torch.arange(SIDE) / 7)
    return torch.stack([rough, wave, -rough.abs(), torch.zeros(SIDE, SIDE), 1e-6 * rough])


@pytest.mark.parametrize("kind", [GradCAM, InputXGradient])
def test_scores_are_the_published_arithmetic(maps, kind):
    boxes = published.scaled_boxes([(3, 5, 40, 41), (61, 11, 100, 80)], 100, 80, SIDE)
    cells = torch.tensor([[[published.inside(x, y, boxes) for x in range(SIDE)] for y in range(SIDE)]] * len(maps))
    profile, method = HowToProbe(), kind()

    def measured(score, protocol, masks=cells):
        return profile.measure(score, method, protocol, maps, masks).tolist()

    lists = maps.double().tolist()
    blurred = [BLUR[kind](each) for each in lists]
    threshold = {GradCAM: 0.2, InputXGradient: 0.5}[kind]
    # In float32 a value may fall on the other side of a rounding.
    assert measured(EPG(), Boxes()) == pytest.approx([published.epg(m, boxes) for m in blurred], abs=0.0101)
    assert measured(EPG(), Boxes())[2:4] == [0, 0], "an empty map counts as 0"
    expected = [published.box_iou(m, boxes, threshold) for m in blurred[:4]]
    assert measured(BoxIoU(), Boxes())[:4] == pytest.approx(expected, abs=0.0101)
    quadrant = torch.zeros(len(maps), SIDE, SIDE, dtype=torch.bool)
    quadrant[:, : SIDE // 2, SIDE // 2 :] = True
    expected = [published.grid_share(m, 1, 2) for m in blurred]
    assert measured(EPG(), GridPG(side=2), quadrant) == pytest.approx(expected, abs=1e-5)
    if kind is GradCAM:
        assert measured(Compactness(), GridPG()) == pytest.approx([published.gini(m) for m in lists], abs=1e-5)
        bits = [value * math.log2(SIDE**2) for value in measured(Complexity(), GridPG())]
        assert bits == pytest.approx([published.entropy(m) for m in lists], abs=1e-4)


def test_box_iou_of_guided_backprop_is_smoothed_otherwise_than_its_epg(maps):
    boxes = published.scaled_boxes([(3, 5, 40, 41)], 100, 80, SIDE)
    mask = torch.tensor([[[published.inside(x, y, boxes) for x in range(SIDE)] for y in range(SIDE)]])
    own = HowToProbe().measure(BoxIoU(), GuidedBackprop(), Boxes(), maps[:1], mask).item()
    blurred = published.gaussian_of_129(maps[0].double().tolist())
    assert own == pytest.approx(published.box_iou(blurred, boxes, 0.3), abs=0.0101)
    with pytest.raises(BadInput, match="needs images of more than 64 pixels; they have 64"):
        smooth(torch.zeros(1, 64, 64), 129)


class Whole(nn.Module):
    """torchvision's own network up to layer4, then a probe's head."""

    def __init__(self, checkpoint, head):
        super().__init__()
        self.trunk, self.head = resnet18(), head
        self.trunk.load_state_dict(torch.load(checkpoint, weights_only=True))
        self.trunk.avgpool = self.trunk.fc = nn.Identity()

    def forward(self, images):
        trunk = self.trunk
        first = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        return self.head(trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(first)))))


def test_epg_of_gradcam_from_files_to_table(trained, scenes, checkpoint, command, tmp_path):
    """Boxes from the XML, images normalised by CLIP, captum's GradCAM on the last convolution, loops over pixels."""
    run = tmp_path / "r"
    shutil.copytree(trained.path, run)
    probes = list(dict.fromkeys(row["probe"] for row in trained.scores))[1:]
    data = ["--backbone", checkpoint, "--dataset", "voc", "--root", scenes, "--device", "cpu"]
    chosen = [word for probe in probes for word in ("--probe", probe)]
    line = ["attribute", "--run", run, *data, *chosen, *PARITY, "--score", "epg,box_iou", "--limit", 3]
    code, out, err = command(*line)
    assert code == 0 and "parity how-to-probe" in out, err
    rows = {
        (r["probe"], r["id"], r["class"]): r
        for r in featcache.open_run(run).table("attribution.csv", epg=float, box_iou=float)
    }
    home, classes, expected = scenes / "VOCdevkit/VOC2007", featcache.open_store(trained.summary["store"]).classes, {}
    for name in dict.fromkeys(i for _, i, _ in rows):
        tree = ElementTree.parse(home / "Annotations" / f"{name}.xml")
        boxes = {}
        for item in tree.iter("object"):
            if item.findtext("difficult") == "0":
                box = [int(item.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
                boxes.setdefault(item.findtext("name"), []).append(box)
        with Image.open(home / "JPEGImages" / f"{name}.jpg") as image:
            image = to_tensor(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
        image = normalize(image, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        for probe in probes:
            own = load_probe(run, probe)
            model = Whole(checkpoint, HeadModule(own.spec.head, own.weights)).eval()
            for label in boxes:
                small = LayerGradCam(model, model.trunk.layer4[-1].conv2).attribute(image[None], classes.index(label))
                large = nn.functional.interpolate(small, (64, 64), mode="bilinear")[0, 0]
                blurred = published.mean_of_25(large.double().tolist())
                scaled = published.scaled_boxes(boxes[label], 320, 240, 64)
                scores = published.epg(blurred, scaled), published.box_iou(blurred, scaled, 0.2)
                expected[probe, name, label] = scores
    assert rows.keys() == expected.keys()
    for key, (epg, iou) in expected.items():
        assert rows[key]["epg"] == pytest.approx(epg, abs=0.0101), key
        assert rows[key]["box_iou"] == pytest.approx(iou, abs=0.0101), key
    assert any(rows[key]["epg"] != 0 for key in expected)
    facts = json.loads((run / "attribution.json").read_bytes())
    assert (facts["parity"], facts["protocol"], facts["pairs"]) == ("how-to-probe", "boxes", len(rows) // len(probes))
    assert facts["preprocessing"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    other = tmp_path / "other"
    shutil.copytree(trained.path, other)
    featcache.attribute(other, probes=probes, limit=3)
    code, _, err = command("compare", "--localisation", "--run", run, "--run", other, *chosen)
    assert code == 2 and "--parity was how-to-probe in one and none in the other" in err
    code, out, err = command(*line, "--dry-run")
    assert code == 0 and "passes of an image through the backbone: 3 forward" in out, err
    code, _, err = command("attribute", "--run", run, *PARITY)
    assert code == 2 and "give --backbone, --dataset and --root" in err
    code, _, err = command("attribute", "--run", run, *data, *PARITY, "--method", "input_x_gradient")
    assert code == 2 and "needs images of more than 64 pixels" in err
    code, _, err = command("attribute", "--run", run, "--parity", "how-to-prob")
    assert code == 2 and "did you mean 'how-to-probe'?" in err


def test_bcos_heads_stay_in_explanation_mode_on_bcos_backbones(backbone_pair):
    def detached(head):
        return [module.detach for module in head.modules() if hasattr(module, "set_explanation_mode")]

    for backbone, left in backbone_pair:
        head = Bcos(layers=2, hidden=8).resolved(5)
        head = HeadModule(head, head.initial_weights(16, 5, torch.Generator().manual_seed(0)))
        source = Source(None, None, None, Network(backbone, None, None), (), 0)
        with pytest.raises(ZeroDivisionError), HowToProbe().explaining([head], source):
            assert detached(head) == [left] * len(detached(head))
            raise ZeroDivisionError
        assert detached(head) and not any(detached(head))


@pytest.fixture(scope="module")
def backbone_pair():
    return [
        (load_backbone("random", arch=arch, size=64), left)
        for arch, left in (("bcos_resnet18", True), ("resnet18", False))
    ]


def test_lrp_takes_heads_for_convolutions():
    assert HowToProbe().method(LRP(gamma=0.1)) == LRP(gamma=0.1, head="convolution")


def test_pictures_of_grids_are_stretched():
    picture = torch.randint(40, 200, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, low, high = stretched(picture), int(picture.min()), int(picture.max())
    for value, own in zip(picture.flatten().tolist(), got.flatten().tolist(), strict=True):
        assert abs(own - int((value - low) / (high - low) * 255)) <= 1
    assert (int(got.min()), int(got.max())) == (0, 255)
