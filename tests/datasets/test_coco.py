"""COCO: what is read equals what pycocotools reads under mmpretrain's rules; what is broken is named."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import write_coco
from pycocotools.coco import COCO
from pycocotools.mask import encode
from torchvision.datasets import CocoDetection

from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def segmentation(box, crowd):
    x, y, w, h = box
    if not crowd:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"counts": [100, 50, 1050], "size": [30, 40]}


def annotation(box, category, crowd, ignore, area):
    found = {"bbox": list(box), "category_id": category, "segmentation": segmentation(box, crowd)}
    # Each of the three may be missing.
    return found | {k: v for k, v in (("iscrowd", crowd), ("ignore", ignore), ("area", area)) if v is not None}


sides = st.floats(-10, 60, width=32)
drawn_boxes = st.tuples(sides, sides, st.floats(0, 40, width=32), st.floats(0, 40, width=32))
annotations = st.builds(
    annotation,
    drawn_boxes,
    st.sampled_from([1, 18, 90]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([None, None, 0, 1]),
    st.sampled_from([None, -1, 0, 0.5, 300]),
)
images = st.dictionaries(st.integers(1, 999_999), st.lists(annotations, max_size=4), min_size=1, max_size=3)


def expected_boxes(coco, image_id):
    """The rules, in the words of mmpretrain's COCO: [(box, class, crowd, annotation id)]."""
    image, kept = coco.loadImgs(image_id)[0], []
    for found in coco.loadAnns(coco.getAnnIds(imgIds=[image_id])):
        if found.get("ignore", False):
            continue
        x1, y1, w, h = found["bbox"]
        inter_w = max(0, min(x1 + w, image["width"]) - max(x1, 0))
        inter_h = max(0, min(y1 + h, image["height"]) - max(y1, 0))
        if inter_w * inter_h == 0 or found.get("area", w * h) <= 0 or w < 1 or h < 1:
            continue
        box = [max(x1, 0), max(y1, 0), min(x1 + w, image["width"]), min(y1 + h, image["height"])]
        kept.append((box, coco.getCatIds().index(found["category_id"]), bool(found.get("iscrowd")), found["id"]))
    return kept


# pycocotools 2.0.11 decodes masks in a way that numpy 2 announces to change.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@settings(max_examples=25, deadline=None)
@given(images)
def test_records_agree_with_pycocotools(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("coco")
    path = write_coco(root, drawn, CATEGORIES)
    data = read_dataset("coco", root, ["val"])
    coco = COCO(path)
    # pycocotools sorts category ids by the file's order, the protocol by their size.
    coco.getCatIds = lambda: sorted(coco.cats)
    assert data.classes == ("person", "dog", "toothbrush") and data.size == 448 and data.resize == "squash"
    oracle = CocoDetection(root / "val2014", path)
    for record, (image, _), image_id in zip(data.splits["val"], oracle, oracle.ids, strict=True):
        assert record.id == str(image_id) and np.array_equal(open_image(record.image), image)
        kept = expected_boxes(coco, image_id)
        np.testing.assert_allclose(record.boxes, np.reshape([box for box, *_ in kept], (-1, 4)), rtol=1e-6, atol=1e-5)
        assert record.box_classes.tolist() == [label for _, label, _, _ in kept]
        assert record.box_crowd.tolist() == [crowd for *_, crowd, _ in kept] and not record.box_difficult.any()
        assert record.labels.tolist() == [int(c in record.box_classes) for c in range(3)]
        if kept:
            masks = [coco.annToMask(coco.loadAnns(i)[0]) for *_, i in kept]
            assert np.array_equal(record.masks.read(), masks) and record.masks.read().dtype == bool
        else:
            assert record.masks is None


PERSON = {"bbox": [1, 1, 9, 9], "area": 81, "category_id": 1}


def edit(change):
    """Damage that changes the parsed annotation file."""

    def damage(root):
        path = root / "annotations/instances_val2014.json"
        parsed = json.loads(path.read_text())
        change(parsed)
        path.write_text(json.dumps(parsed))

    return damage


def break_json(root):
    path = root / "annotations/instances_val2014.json"
    path.write_text(path.read_text().replace('"images": [', '"images": [\n\n{,'))


def pack(root):
    shutil.rmtree(root / "val2014")
    (root / "val2014.zip").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, r"broken JSON in .*val2014\.json, line 3"),
        (pack, r"no image folder val2014 in .*; unpack .*val2014\.zip; expected this layout:\n"),
        (lambda root: shutil.rmtree(root / "annotations"), r"no annotations/instances_val2014\.json .*expected this"),
        (lambda root: next((root / "val2014").iterdir()).unlink(), r"image not found: .*000000000001\.jpg"),
        (edit(lambda a: a.pop("categories")), "'categories' must be a list"),
        (edit(lambda a: a["images"][0].pop("height")), "images entry 0 lacks 'height'"),
        (edit(lambda a: a["images"].append(a["images"][0])), "images id 1 comes twice"),
        (edit(lambda a: a["annotations"][0].update(category_id=5)), "annotation 1 has an unknown category_id: 5"),
        (edit(lambda a: a["annotations"][0].update(image_id=5)), "annotation 1 has an unknown image_id: 5"),
        (edit(lambda a: a["annotations"][0].update(bbox=[1, 2, 3])), "annotation 1 needs a bbox"),
        (edit(lambda a: a["annotations"][0].update(bbox=[1, 2, 3, float("nan")])), "annotation 1 needs a bbox"),
        (edit(lambda a: a["annotations"][0].update(area="big")), "a number as area"),
        (lambda root: (root / "annotations/instances_val2014.json").write_text("[]"), "'images' must be a list"),
        (lambda root: (root / "annotations/instances_val2014.json").write_bytes(b"\xff"), "cannot read .*val2014.json"),
        (edit(lambda a: a["annotations"][0].update(iscrowd="maybe")), "iscrowd of annotation 1 is 'maybe', expected 0"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write_coco(tmp_path, {1: [PERSON]})
    damage(tmp_path)
    with pytest.raises(BadInput, match=message):
        read_dataset("coco", tmp_path, ["val"])


def test_splits_must_agree_on_the_categories(tmp_path):
    write_coco(tmp_path, {1: [PERSON]})
    write_coco(tmp_path, {1: [PERSON]}, CATEGORIES[:2], name="train2014")
    with pytest.raises(BadInput, match="the categories of val are not those of train"):
        read_dataset("coco", tmp_path)
    with pytest.raises(BadInput, match=r"COCO has no split 'test' \(it has train, val\)"):
        read_dataset("coco", tmp_path, ["test"])


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = write_coco(tmp_path, {1: [PERSON]})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [r.id for r in read_dataset("coco", tmp_path, ["val"]).splits["val"]] == ["1"]


def with_mask(segmentation):
    return PERSON | ({} if segmentation is None else {"segmentation": segmentation})


TRIANGLE = [2, 2, 12, 2, 12, 20]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("none", [None, [], "null"])
def test_objects_without_segmentation_have_boxes_only(tmp_path, none):
    missing = PERSON | {"segmentation": None} if none == "null" else with_mask(none)
    write_coco(tmp_path, {1: [with_mask([TRIANGLE]), missing], 2: [missing], 3: [with_mask([TRIANGLE])]})
    first, second, third = read_dataset("coco", tmp_path, ["val"]).splits["val"]
    assert first.masks is second.masks is None and len(first.boxes) == 2 and len(second.boxes) == 1
    assert third.masks.read().shape == (1, 30, 40)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_valid_segmentation_is_that_of_pycocotools(tmp_path):
    mask = np.asfortranarray(np.random.default_rng(0).integers(0, 2, (30, 40), np.uint8))
    packed = encode(mask)
    valid = [
        [TRIANGLE],
        [TRIANGLE, [20, 5, 30.5, 5, 30, 15, 20, 15.25]],
        # A part of two points is a line; only as the first it would be taken for a box.
        [TRIANGLE, [20, 5, 30, 5]],
        [[-5, -5, 60, -5, 60, 60]],
        {"counts": [0, 300, 900], "size": [30, 40]},
        {"counts": packed["counts"].decode(), "size": [30, 40]},
    ]
    path = write_coco(tmp_path, {1: [with_mask(given) for given in valid]})
    (record,) = read_dataset("coco", tmp_path, ["val"]).splits["val"]
    coco, masks = COCO(path), record.masks.read()
    assert masks.dtype == bool and masks.shape == (6, 30, 40) and masks.any((1, 2)).all()
    assert np.array_equal(masks, [coco.annToMask(coco.anns[i]) for i in range(1, 7)])
    assert np.array_equal(masks[5], mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1, 9, 9], "neither an RLE nor polygons"),
        ([[1, 1, 9, 9]], "neither an RLE nor polygons"),
        ([TRIANGLE[:5]], "neither an RLE nor polygons"),
        ([TRIANGLE, "x"], "neither an RLE nor polygons"),
        ([["a"] * 6], "neither an RLE nor polygons"),
        ([[float("nan")] * 6], "neither an RLE nor polygons"),
        (7, "neither an RLE nor polygons"),
        ({"counts": [0, 300, 900], "size": [40, 30]}, r"an RLE of size \[40, 30\], the image is \[30, 40\]"),
        ({"counts": [0, 300, 600], "size": [30, 40]}, "an RLE of 900 pixels, the image has 1200"),
        ({"counts": "garbage", "size": [30, 40]}, ""),
        ({"counts": None, "size": [30, 40]}, ""),
        ({"size": [30, 40]}, ""),
    ],
)
def test_what_is_no_mask_is_named(tmp_path, given, message):
    write_coco(tmp_path, {1: [with_mask([TRIANGLE]), with_mask(given)]})
    (record,) = read_dataset("coco", tmp_path, ["val"]).splits["val"]
    with pytest.raises(BadInput, match=f"val2014.json: segmentation of annotation 2: .*{message}"):
        record.masks.read()
