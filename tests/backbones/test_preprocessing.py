"""Preprocessing: torchvision's pixels, B-cos's channels, boxes that follow, and all of it in the store's identity."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from explaining import explain
from extracting import SIZE, options
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import write_voc
from PIL import Image, ImageDraw
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode

import featcache
from featcache.attribution.methods.input_x_gradient import InputXGradient as Products
from featcache.backbones import ARCHITECTURES
from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.load import load_backbone
from featcache.datasets import DATASETS, read_dataset
from featcache.datasets.image import open_image
from featcache.datasets.record import Record
from featcache.errors import BadInput
from featcache.extraction.images import DECODERS, load_input
from featcache.feature import Feature
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.module import HeadModule
from featcache.store.manifest import read_manifest

PLAIN = Preprocessing(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Each rule in torchvision's words: short side and size in pixels, interpolation.
ORACLES = {
    "squash": lambda short, size, how: [transforms.Resize((size, size), how)],
    "crop": lambda short, size, how: [transforms.Resize(short, how), transforms.CenterCrop(size)],
    "warp": lambda short, size, how: [transforms.Resize(short, how), transforms.Resize((size, size), how)],
}


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(list(ORACLES)),
    how=st.sampled_from(["bilinear", "bicubic"]),
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    size=st.integers(1, 40),
    more=st.none() | st.integers(0, 15),
    seed=st.integers(0, 99),
)
def test_pixels_are_torchvisions(rule, how, width, height, size, more, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    short = None if rule == "squash" or more is None else size + more
    got = PLAIN.changed(size=size, resize=rule, short_side=short, interpolation=how).apply(image)
    oracle = ORACLES[rule](short or round(size * 8 / 7), size, InterpolationMode(how))
    assert torch.equal(got, transforms.PILToTensor()(transforms.Compose(oracle)(image)))


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(ORACLES)),
    width=st.integers(2, 120),
    height=st.integers(2, 120),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_opencvs_pixels(rule, width, height, size, seed):
    """What cv2.resize makes of the sides that torchvision gives, and of a view's crop."""
    cv2 = pytest.importorskip("cv2")
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    preprocessing = PLAIN.changed(size=size, resize=rule, interpolation="opencv_bilinear")
    short, expected = round(size * 8 / 7), pixels
    if rule != "squash":
        sides = transforms.Resize(short)(Image.fromarray(pixels)).size
        expected = cv2.resize(pixels, sides, interpolation=cv2.INTER_LINEAR)
    if rule == "crop":
        expected = np.asarray(transforms.CenterCrop(size)(Image.fromarray(expected)))
    else:
        expected = cv2.resize(expected, (size, size), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(preprocessing.apply(Image.fromarray(pixels)).permute(1, 2, 0), expected)
    left, top = width // 3, height // 4
    view = preprocessing.apply_view(Image.fromarray(pixels), (left, top, width, height), True)
    expected = cv2.resize(pixels[top:, left:], (size, size), interpolation=cv2.INTER_LINEAR)[:, ::-1]
    assert np.array_equal(view.permute(1, 2, 0), expected)


def test_opencv_is_part_of_the_identity(scenes, checkpoint, tmp_path, command, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    given = options(scenes, checkpoint, tmp_path / "s.zarr", split="val", features="pooled")
    given += ["--interpolation", "opencv_bilinear", "--workers", 1]
    code, _, err = command("extract", *given, "--decoder", "draft")
    assert code == 2 and "--decoder draft does not go with --interpolation opencv_bilinear" in err
    code, _, err = command("extract", *given)
    assert code == 0 and "squash to 64x64 (opencv_bilinear)" in err
    assert read_manifest(tmp_path / "s.zarr").identity["preprocessing"]["interpolation"] == "opencv_bilinear"
    record = read_dataset("voc", scenes, ["val"]).splits["val"][0]
    pixels = cv2.resize(np.asarray(open_image(record.image)), (64, 64), interpolation=cv2.INTER_LINEAR)
    backbone = load_backbone(checkpoint, size=64)
    images = backbone.preprocessing.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    expected = backbone(images, [Feature("layer4", "pooled")])["layer4:pooled"]
    got = torch.from_numpy(featcache.open_store(tmp_path / "s.zarr")["val"]["pooled"][:1])
    torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=1e-3)
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, _, err = command("extract", *given, "--size", 32, "--store", tmp_path / "t.zarr")
    assert code == 2 and "needs OpenCV: pip install 'featcache[opencv]'" in err and not (tmp_path / "t.zarr").exists()


@pytest.mark.parametrize("rule", ORACLES)
def test_a_reduced_image_keeps_its_place(tmp_path, rule):
    """A JPEG decoded at half its odd sides, rounded up, is seen as the whole one is; and a view knows no rule."""
    slopes = np.linspace(0, 255, 403)[:, None] * [1, 0, 0.5] + np.linspace(0, 255, 601)[:, None, None] * [0, 1, 0.5]
    Image.fromarray(slopes.astype(np.uint8)).save(tmp_path / "slopes.jpg", quality=95)
    record = Record("slopes", tmp_path / "slopes.jpg", 0, height=601, width=403)
    preprocessing = PLAIN.changed(size=40, resize=rule)
    whole, reduced = (load_input(record, preprocessing, decoder).int() for decoder in DECODERS.values())
    # One pixel of the input is some ten values of a slope.
    assert not torch.equal(whole, reduced) and (whole - reduced).abs().max() <= 3
    view = load_input(record, preprocessing, crop=(10, 20, 300, 200, 1))
    assert torch.equal(view, load_input(record, PLAIN.changed(size=40), crop=(10, 20, 300, 200, 1)))


def test_the_protocols_short_sides():
    for size, short in ((224, 256), (448, 512), (299, 342), (384, 439)):
        assert PLAIN.changed(size=size, resize="crop").describe()["short_side"] == short


def test_normalisation_is_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    oracle = transforms.Normalize(PLAIN.mean, PLAIN.std)(pixels.float() / 255)
    torch.testing.assert_close(PLAIN.normalise(pixels), oracle, rtol=0, atol=1e-6)


def test_six_channels_are_those_of_bcos():
    bcos = pytest.importorskip("bcos.data.transforms")
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    got = Preprocessing(8, (0, 0, 0), (1, 1, 1), inverse=True).normalise(pixels)
    assert got.shape == (2, 6, 8, 8) and torch.equal(got, bcos.AddInverse()(pixels.float() / 255))


def test_old_stores_keep_their_identity():
    """The text of a manifest from before there were other rules: its hash is part of every such store's id."""
    text = (
        '{"size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": "squash", '
        '"interpolation": "bilinear"}'
    )
    assert json.dumps(PLAIN.describe()) == text and Preprocessing(**json.loads(text)) == PLAIN


@settings(max_examples=30, deadline=None)
@given(
    rule=st.sampled_from(list(ORACLES)),
    how=st.sampled_from(["bilinear", "bicubic"]),
    short=st.none() | st.integers(64, 99),
    inverse=st.booleans(),
)
def test_an_identity_reads_back_as_the_same_preprocessing(rule, how, short, inverse):
    plain = Preprocessing(64, (0, 0, 0), (1, 1, 1), inverse=True) if inverse else PLAIN
    given = plain.changed(resize=rule, interpolation=how, short_side=None if rule == "squash" else short)
    stored = json.loads(json.dumps(given.describe()))
    assert Preprocessing(**stored).describe() == stored and str(Preprocessing(**stored)) == str(given)
    assert ("short_side" in stored) == (rule != "squash") and ("inverse" in stored) == inverse


@settings(max_examples=100, deadline=None)
@given(rule=st.sampled_from(list(ORACLES)), width=st.integers(70, 200), height=st.integers(70, 200), data=st.data())
def test_boxes_land_where_the_paint_does(rule, width, height, data):
    """Paint a box, prepare the image: the pixels that are more paint than not are those of the mapped box."""
    x0, y0 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    box = (x0, y0, data.draw(st.integers(x0 + 20, width)), data.draw(st.integers(y0 + 20, height)))
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    preprocessing = PLAIN.changed(size=40, resize=rule)
    painted = preprocessing.apply(image)[0] >= 128
    (moved,), (inside,) = preprocessing.map_boxes([box], height, width)
    assert moved.min() >= 0 and moved.max() <= 40
    # Of a sliver at the input's edge no pixel is mostly paint.
    assume(not inside or min(moved[2] - moved[0], moved[3] - moved[1]) >= 2)
    wrong = (box_mask([moved] if inside else [], 40) != painted).nonzero().numpy() + 0.5
    to_edge = [min(abs(y - moved[1]), abs(y - moved[3]), abs(x - moved[0]), abs(x - moved[2])) for y, x in wrong]
    assert max(to_edge, default=0) < 0.6, "only pixels that an edge runs through, or whose corner is round"
    assert inside or not painted.any()


def test_boxes_by_hand():
    # 200 x 100 to 80 x 40, of which the middle 30 x 30: from (25, 5).
    crop = PLAIN.changed(size=30, resize="crop", short_side=40)
    boxes, inside = crop.map_boxes([(100, 50, 120, 70), (0, 0, 60, 100), (0, 0, 70, 20), (150, 0, 200, 100)], 100, 200)
    assert inside.tolist() == [True, False, True, False]
    assert boxes[0].tolist() == [15, 15, 23, 23] and boxes[2].tolist() == [0, 0, 3, 3]
    for rule in ("squash", "warp"):
        boxes, inside = PLAIN.changed(size=30, resize=rule).map_boxes([(100, 50, 120, 70)], 100, 200)
        assert boxes.tolist() == [[15, 15, 18, 21]] and inside.all()
    assert PLAIN.map_boxes(np.empty((0, 4), np.float32), 100, 200)[0].shape == (0, 4)


GRID = {"probes": [{"features": "spatial", "head": "linear", "loss": "bce", "epochs": 1, "optimizer": {"type": "sgd", "lr": 0.1}}]}  # fmt: skip


@pytest.fixture(scope="module")
def corner(tmp_path_factory):
    """A dataset 60 x 50 in which every cat is in the middle and every dog at the left edge."""
    root = tmp_path_factory.mktemp("corner")
    objects = [("cat", False, (21, 11, 40, 30)), ("dog", False, (1, 1, 8, 50))]
    for number, split in enumerate(("train", "val", "test")):
        write_voc(root, {f"{number}{n:05d}": objects for n in range(4)}, split=split)
    return root


def test_attribution_follows_the_crop(corner, command, tmp_path):
    """60 x 50 to 44 x 37, cut at (6, 2): 8.2 pixels go at the left, and with them the dogs."""
    words = ["--backbone", "random", "--arch", "resnet18", "--dataset", "voc", "--root", corner]
    store, run = tmp_path / "s.zarr", tmp_path / "r"
    code, _, err = command("extract", *words, "--size", 32, "--resize", "crop", "--store", store, "--workers", 0)
    assert code == 0 and "preprocessing: short side to 37, then centre crop 32x32 (bilinear), mean" in err
    featcache.train_probes(GRID, store=store, run=run)
    code, out, err = command("attribute", "--run", run, "--method", "gradcam,input_x_gradient", *words)
    assert code == 0, err
    with open(run / "attribution.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {r["class"] for r in rows} == {"cat"}
    kept = np.load(run / "attribution.npz")
    assert kept["box_classes"].tolist() == ["cat"] * 4
    expected = [20 * 44 / 60 - 6, 10 * 37 / 50 - 2, 40 * 44 / 60 - 6, 30 * 37 / 50 - 2]
    np.testing.assert_allclose(kept["boxes"], [expected] * 4)
    share = sum(expected[0] <= c + 0.5 < expected[2] for c in range(32)) / 32
    share *= sum(expected[1] <= c + 0.5 < expected[3] for c in range(32)) / 32
    assert [float(r["box_share"]) for r in rows] == pytest.approx([share] * 8)
    record = read_dataset("voc", corner, ["test"]).splits["test"][0]
    oracle = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])(open_image(record.image))
    assert (kept["images"][0] == np.asarray(oracle)).all(), "prepared as the store was, without being asked to"


def six_channels():
    network = resnet18()
    network.conv1 = nn.Conv2d(6, 64, 7, 2, 3, bias=False)
    return network


def test_extraction_and_attribution_with_six_channels(scenes, monkeypatch, tmp_path):
    whole = ARCHITECTURES["resnet18"]
    monkeypatch.setitem(ARCHITECTURES, "six", replace(whole, name="six", build=six_channels, inverse=True))
    given = dict(dataset="voc", root=scenes, arch="six", backbone="random")
    path = featcache.extract(**given, size=32, dtype="float32", workers=0, store=tmp_path / "s.zarr")
    identity = read_manifest(path).identity["preprocessing"]
    assert (identity["inverse"], identity["mean"], identity["std"]) == (True, [0, 0, 0], [1, 1, 1])

    backbone = load_backbone("random", arch="six", size=32)
    records = read_dataset("voc", scenes, ["test"]).splits["test"][:4]
    images = torch.stack([transforms.functional.to_tensor(open_image(r.image).resize((32, 32), 2)) for r in records])
    images = torch.cat([images, 1 - images], 1)
    network = nn.Sequential(backbone.trunk, nn.Linear(512, 3))
    with torch.inference_mode():
        expected = backbone.trunk(images.contiguous(memory_format=torch.channels_last))
    np.testing.assert_allclose(featcache.open_store(path)["test"]["pooled"][:4], expected, rtol=1e-4, atol=1e-5)

    weights = {f"fc0.{name}": tensor.detach() for name, tensor in network[1].named_parameters()}
    head = HeadModule(Linear(), weights)
    got = explain(Products(), backbone, Feature("layer4", "spatial"), [head], images[[0, 3]], [(1,), (2,)])[0, :, 0]
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    oracle = InputXGradient(network).attribute(images[[0, 3]].requires_grad_(), torch.tensor([1, 2])).sum(1).detach()
    # In the norm: at a pre-activation of nearly zero, rounding decides which way a ReLU goes.
    assert (got - oracle).norm() < 1e-3 * oracle.norm()

    run = tmp_path / "r"
    featcache.train_probes(GRID, store=path, run=run)
    rows = featcache.attribute(run, methods=["input_x_gradient"], limit=2, examples=0, **given)
    assert rows and all(0 <= r["epg"] <= 1 for r in rows)
    with pytest.raises(BadInput, match="takes pixels in 0..1 as they are"):
        load_backbone("random", arch="six", mean=(0.5, 0.5, 0.5))


def test_overrides_are_printed_and_recorded(scenes, checkpoint, tmp_path, command):
    words = ["--resize", "warp", "--short-side", 70, "--interpolation", "bicubic"]
    words += ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.25,1"]
    given = options(scenes, checkpoint, tmp_path / "s.zarr", split="val", features="pooled")
    code, _, err = command("extract", *given, *words)
    line = "preprocessing: short side to 70, then squash to 64x64 (bicubic), mean 0.5,0.4,0.3, std 0.2,0.25,1\n"
    assert code == 0 and line in err
    assert read_manifest(tmp_path / "s.zarr").identity["preprocessing"] == {
        "size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 1.0], "resize": "warp", "interpolation": "bicubic",
        "short_side": 70,
    }  # fmt: skip
    code, _, err = command("extract", *given, *words, "--short-side", 71)
    assert code == 2 and "preprocessing.short_side: 70 -> 71" in err


def test_the_datasets_protocol_counts_until_the_user_speaks(scenes, checkpoint, tmp_path, monkeypatch):
    def protocol(root, splits=None):
        return replace(DATASETS["voc2007"](root, splits=splits), resize="crop", size=48)

    monkeypatch.setitem(DATASETS, "cropped", protocol)
    extract = partial(
        featcache.extract, checkpoint, "cropped", root=scenes, splits=["val"], features="pooled", workers=0
    )
    first = read_manifest(extract(store=tmp_path / "a.zarr")).identity["preprocessing"]
    assert (first["resize"], first["size"], first["short_side"]) == ("crop", 48, 55)
    second = read_manifest(extract(store=tmp_path / "b.zarr", size=SIZE, resize="squash")).identity["preprocessing"]
    assert (second["resize"], second["size"]) == ("squash", SIZE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resize", "squish"], "--resize squish: unknown; did you mean 'squash'? (known: squash, crop, warp)"),
        (["--interpolation", "bicubik"], "did you mean 'bicubic'?"),
        (["--mean", "0.5,0.5"], "--mean: expected three numbers"),
        (["--mean", "a,b,c"], "'a,b,c' is not three numbers"),
        (["--mean", "123.675,116.28,103.53"], "divide by 255"),
        (["--std", "0.2,nan,0.2"], "--std: expected three numbers"),
        (["--std", "0.2,0,0.2"], "must be above 0"),
        (["--short-side", "80"], "goes with --resize crop or warp"),
        (["--resize", "crop", "--short-side", "63"], "--short-side 63 is less than the crop, --size 64"),
    ],
)
def test_wrong_words(scenes, checkpoint, tmp_path, command, words, message):
    code, _, err = command("extract", *options(scenes, checkpoint, tmp_path / "s.zarr"), *words)
    assert code == 2 and message in err and "Traceback" not in err and not list(tmp_path.glob("s.zarr*"))


def test_a_class_without_a_box_in_the_crop_anywhere_is_said(corner, tmp_path):
    shutil.copytree(corner, tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.xml"):
        file.write_text(file.read_text().replace("<xmin>21<", "<xmin>1<").replace("<xmax>40<", "<xmax>8<"))
    path = featcache.extract(
        "random", "voc", root=tmp_path / "data", arch="resnet18", size=32, resize="crop", workers=0, store=tmp_path / "s.zarr"
    )  # fmt: skip
    run = featcache.train_probes(GRID, store=path, run=tmp_path / "r")
    with pytest.raises(BadInput, match="has no box to score against"):
        featcache.attribute(run.path)
