"""Maps against segmentation masks: their way through the preprocessing, void pixels, and every number by loops."""

import csv
import shutil

import numpy as np
import pytest
import torch
from layouts import write_coco
from PIL import Image, ImageDraw

import featcache
from featcache.attribution.methods.cam import upsample
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.scores.epg import EPG
from featcache.attribution.scores.mask_iou import MaskIoU
from featcache.attribution.scores.pointing_game import PointingGame
from featcache.attribution.targets import Target
from featcache.backbones.input.box_mask import box_mask
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.datasets import read_dataset
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe

GRID = {
    "probes": [
        {"features": "pooled", "head": "linear", "loss": ["bce", "ce"], "epochs": 2, "optimizer": {"type": "sgd", "lr": 0.5}},
    ]
}  # fmt: skip
SCORES = "epg,mask_iou:threshold=0.5,pointing_game,compactness"


@pytest.fixture(scope="module")
def segmented(scenes, tmp_path_factory):
    """The scenes, with an ellipse in each box of the first 15 test images, within a border of void pixels."""
    root = tmp_path_factory.mktemp("segmented") / "scenes"
    shutil.copytree(scenes, root)
    home, data = root / "VOCdevkit/VOC2007", read_dataset("voc", root, ["test"])
    for kind in ("SegmentationClass", "SegmentationObject"):
        (home / kind).mkdir()
    for record in data.splits["test"][:15]:
        for kind, numbers in (("SegmentationObject", range(1, 9)), ("SegmentationClass", record.box_classes + 1)):
            image = Image.new("P", (record.width, record.height))
            image.putpalette(bytes(range(256)) * 3)
            for box, number in zip(record.boxes.tolist(), numbers, strict=False):
                ImageDraw.Draw(image).ellipse(box, fill=int(number), outline=255, width=5)
            image.save(home / kind / f"{record.id}.png")
    return root


def table(run):
    with open(run / "attribution.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_masks_and_boxes_go_the_same_way():
    """Through every resize rule; squashed masks are Pillow's nearest neighbours, cropped ones those of torchvision."""
    random = np.random.default_rng(0)
    for resize, size in (("squash", 33), ("crop", 32), ("warp", 24), ("crop", 65)):
        preprocessing = Preprocessing(size, (0, 0, 0), (1, 1, 1), resize=resize)
        for height, width in random.integers(20, 200, (20, 2)).tolist():
            x0, x1 = sorted(random.integers(0, width + 1, 2).tolist())
            y0, y1 = sorted(random.integers(0, height + 1, 2).tolist())
            mask = np.zeros((2, height, width), bool)
            mask[0, y0:y1, x0:x1] = True
            mask[1] = random.random((height, width)) < 0.5
            mapped = preprocessing.map_masks(mask)
            boxes, _ = preprocessing.map_boxes(np.array([[x0, y0, x1, y1]]), height, width)
            assert np.array_equal(mapped[0], box_mask(boxes, size).numpy())
            whole, (left, top) = preprocessing._placed(height, width)
            image = Image.fromarray(mask[1]).resize(whole, Image.Resampling.NEAREST)
            expected = np.asarray(image.crop((left, top, left + size, top + size)))
            # A centre on the edge of two pixels goes either way in Pillow, which adds floats up.
            clear = [
                (2 * (np.arange(size) + first) + 1) * side % (2 * sides) != 0
                for first, side, sides in ((top, height, whole[1]), (left, width, whole[0]))
            ]
            assert np.array_equal(mapped[1][np.ix_(*clear)], expected[np.ix_(*clear)])


def test_void_pixels_do_not_count():
    """By hand: the left column is the object, the upper right pixel is void."""
    mask, void = torch.tensor([[[True, False], [True, False]]]), torch.tensor([[[False, True], [False, False]]])
    maps = torch.tensor([[[1.0, 9.0], [2.0, 3.0]]]).masked_fill(void, 0)
    for score, value, level in ((EPG(), 0.5, 2 / 3), (MaskIoU(), 2 / 3, 2 / 3), (PointingGame(), 0, 2 / 3)):
        assert score.measure(maps, mask).item() == pytest.approx(value)
        assert score.chance(mask, void).item() == pytest.approx(level)
        assert score.chance(mask, None).item() == pytest.approx(0.5)


def test_targets_keep_their_masks():
    mask = torch.rand(3, 37, 37) < 0.2
    target = Target(4, 2, mask[0], mask[1])
    assert torch.equal(target.mask, mask[0]) and torch.equal(target.void, mask[1])
    assert target.pixels == mask[0].sum() and Target(4, 2, mask[0], torch.zeros(37, 37, dtype=torch.bool)).void is None


def test_every_number_by_loops(trained, run, segmented, store, command):
    code, out, err = command("attribute", "--run", run, "--protocol", "masks", "--score", SCORES,
                             "--dataset", "voc", "--root", segmented)  # fmt: skip
    assert code == 0 and "mask IoU %" in out, err
    rows, data = table(run), read_dataset("voc", segmented, ["test"])
    records = {record.id: record for record in data.splits["test"]}
    with_objects = [r for r in data.splits["test"] if not r.box_difficult.all()]
    left_out = sum(r.masks is None for r in with_objects)
    assert left_out and f"notice: {left_out} of {len(with_objects)} images with objects have no mask" in err
    assert {row["split"] for row in rows} == {"test, masks"}
    assert {row["id"] for row in rows} == {r.id for r in with_objects if r.masks is not None}
    test, numbers = featcache.open_store(store)["test"], dict.fromkeys(row["probe"] for row in rows)
    heads = {probe: HeadModule((own := load_probe(run, probe)).spec.head, own.weights) for probe in numbers}
    for row in rows:
        record, label = records[row["id"]], data.classes.index(row["class"])
        maps = torch.from_numpy(test["spatial"][test.ids.index(record.id)][None])
        values = upsample(GradCAM().small(heads[row["probe"]], maps, torch.tensor([label])), 64)[0].numpy()
        path = segmented / f"VOCdevkit/VOC2007/SegmentationObject/{record.id}.png"
        shown = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.NEAREST))
        own = [n + 1 for n, c in enumerate(record.box_classes) if c == label]
        hard = [n for n in own if record.box_difficult[n - 1]]
        inside = np.isin(shown, [n for n in own if n not in hard])
        counts = ~np.isin(shown, [255, *hard])
        positive = np.where(counts, values.clip(min=0), 0)
        large = positive >= 0.5 * positive.max()
        assert float(row["region_pixels"]) == inside.sum()
        assert float(row["box_share"]) == pytest.approx(inside.sum() / counts.sum())
        assert row["mask_iou_uniform"] == row["pointing_game_chance"] == row["box_share"]
        if positive.max() > 0:
            assert float(row["epg"]) == pytest.approx(positive[inside].sum() / positive.sum(), abs=1e-5)
            assert float(row["mask_iou"]) == pytest.approx((large & inside).sum() / ((large | inside) & counts).sum())
            assert float(row["pointing_game"]) == inside.flat[positive.argmax()]
        else:
            assert row["epg"] == row["mask_iou"] == row["pointing_game"] == ""
    assert any(shown_as == "" or float(shown_as) >= 0 for shown_as in (row["compactness"] for row in rows))
    with np.load(run / "attribution.npz") as kept:
        panels, masks = kept["panels"], kept["masks"]
    sizes = {(row["id"], row["class"]): float(row["region_pixels"]) for row in rows}
    assert [sizes[panel[3], panel[4]] for panel in panels] == [*masks.sum((1, 2))] * 2
    code, _, err = command("report", "--run", run, "--out", run / "page.html")
    assert code == 0 and "Mask IoU: intersection" in (run / "page.html").read_text(), err


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_from_images_to_scores(checkpoint, command, tmp_path):
    """Polygons and an RLE, from the annotation file to the table."""
    images, ring = {}, {"counts": [0, 300, 900], "size": [30, 40]}
    for number in range(1, 5):
        polygon = [[2, 3, 22, 3, 22, 13, 2, 13]]
        images[number] = [
            {"category_id": 1, "bbox": [2, 3, 20, 10], "area": 200, "iscrowd": 0, "segmentation": polygon}
        ]
    images[4].append({"category_id": 18, "bbox": [0, 0, 10, 30], "area": 300, "iscrowd": 1, "segmentation": ring})
    images[5] = [{"category_id": 18, "bbox": [0, 0, 10, 30], "area": 300, "iscrowd": 0, "segmentation": []}]
    write_coco(tmp_path, {100 + number: own for number, own in images.items()}, name="train2014")
    write_coco(tmp_path, images, name="val2014")
    data, run = ["--dataset", "coco", "--root", tmp_path], tmp_path / "r"
    words = ["--backbone", checkpoint, *data, "--size", 64, "--features", "pooled,spatial", "--workers", 0]
    code, _, err = command("extract", *words, "--store", tmp_path / "s.zarr")
    assert code == 0, err
    featcache.train_probes({"probes": [GRID["probes"][0] | {"loss": "bce"}]}, store=tmp_path / "s.zarr", run=run)
    code, _, err = command("attribute", "--run", run, "--protocol", "masks", *data)
    assert code == 0 and "notice: 1 of 5 images with objects have no mask" in err, err
    rows = table(run)
    assert [(row["id"], row["class"]) for row in rows] == [*((str(n), "person") for n in range(1, 5)), ("4", "dog")]
    # The polygon covers 20 x 10 pixels, the crowd the first 300 pixels column by column, of 40 x 30.
    assert [float(row["box_share"]) for row in rows] == pytest.approx([200 / 1200] * 4 + [300 / 1200], abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--protocol masks reads the data set's segmentation: give --dataset and --root"),
        (["--split", "val", "DATA"], "no image of split val has a segmentation mask"),
        (
            ["--score", "box_iou", "DATA"],
            "--score box_iou looks at boxes, and --protocol masks has masks; scores that fit",
        ),
        (
            ["--score", "insertion", "DATA"],
            "--score insertion runs the backbone: give --backbone, --dataset and --root",
        ),
    ],
)
def test_what_masks_cannot_do(run, segmented, command, words, message):
    data = [
        part for word in words for part in (["--dataset", "voc", "--root", segmented] if word == "DATA" else [word])
    ]
    code, _, err = command("attribute", "--run", run, "--protocol", "masks", *data)
    assert code == 2 and message in err.splitlines()[-1], err


def test_a_damaged_mask_is_named(run, segmented, command, tmp_path):
    shutil.copytree(segmented, tmp_path / "scenes")
    first = sorted((tmp_path / "scenes/VOCdevkit/VOC2007/SegmentationObject").iterdir())[0]
    first.write_bytes(first.read_bytes()[:50])
    code, _, err = command(
        "attribute", "--run", run, "--protocol", "masks", "--dataset", "voc", "--root", tmp_path / "scenes"
    )
    assert code == 2 and f"unreadable segmentation mask {first}" in err
