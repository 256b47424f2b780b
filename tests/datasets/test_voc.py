"""VOC: what is read equals what torchvision reads; what is broken is named."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import write_voc
from PIL import Image
from torchvision.datasets import VOCDetection

from featcache.datasets import Dataset, Record, read_dataset
from featcache.datasets.voc import CLASSES
from featcache.errors import BadInput

boxes = st.tuples(st.integers(1, 30), st.integers(1, 25), st.integers(31, 60), st.integers(26, 50))
objects = st.lists(st.tuples(st.sampled_from(CLASSES), st.booleans(), boxes), max_size=4)


@settings(max_examples=15, deadline=None)
@given(st.lists(objects, min_size=1, max_size=3))
def test_records_agree_with_torchvision(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, {f"{n:06d}": found for n, found in enumerate(drawn)})
    data = read_dataset("voc", root, ["train"])
    assert data.classes == CLASSES
    oracle = VOCDetection(root, year="2007", image_set="train")
    for record, (image, target) in zip(data.splits["train"], oracle, strict=True):
        assert (record.width, record.height) == image.size
        found = target["annotation"].get("object", [])
        assert [CLASSES[c] for c in record.box_classes] == [o["name"] for o in found]
        assert record.box_difficult.tolist() == [o["difficult"] == "1" for o in found]
        expected = [
            [float(o["bndbox"][k]) - (k in ("xmin", "ymin")) for k in ("xmin", "ymin", "xmax", "ymax")] for o in found
        ]
        assert record.boxes.tolist() == expected
        for index, name in enumerate(CLASSES):
            flags = [o["difficult"] == "1" for o in found if o["name"] == name]
            assert record.labels[index] == (0 if not flags else -1 if all(flags) else 1)


def test_classes_come_from_the_data_with_a_notice(tmp_path, capsys):
    write_voc(tmp_path, {"1": [("zebra", False, (1, 1, 9, 9))]})
    write_voc(tmp_path, {"2": [("ant", False, (1, 1, 9, 9))]}, split="val")
    data = read_dataset("voc", tmp_path, ["train"])
    assert data.classes == ("ant", "zebra"), "all annotations count, not only those of the splits asked for"
    assert "notice" in capsys.readouterr().err


def test_root_may_be_any_level_and_come_from_the_environment(tmp_path, monkeypatch):
    home = write_voc(tmp_path / "voc", {"1": []})
    for root in (tmp_path / "voc", tmp_path / "voc" / "VOCdevkit", home):
        assert len(read_dataset("voc", root, ["train"]).splits["train"]) == 1
    monkeypatch.setenv("FEATCACHE_DATA", str(tmp_path))
    assert len(read_dataset("voc", None, ["train"]).splits["train"]) == 1


def test_2012_has_no_public_test_labels(tmp_path):
    write_voc(tmp_path, {"1": []}, year=2012)
    write_voc(tmp_path, {"2": []}, year=2012, split="val")
    assert list(read_dataset("voc2012", tmp_path).splits) == ["train", "val"]
    with pytest.raises(BadInput, match="use --dataset voc2012"):
        read_dataset("voc", tmp_path)


def test_fingerprint_sees_labels_images_and_order(tmp_path):
    def fingerprint(root):
        return read_dataset("voc", root, ["train"]).fingerprint("train")

    dog = ("dog", False, (1, 2, 30, 40))
    write_voc(tmp_path / "a", {"1": [dog], "2": []})
    before = fingerprint(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == before, "moving files changes nothing"
    write_voc(tmp_path / "c", {"2": [], "1": [dog]})
    write_voc(tmp_path / "d", {"1": [("cat", False, dog[2])], "2": []})
    write_voc(tmp_path / "e", {"1": [dog], "2": []})
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)).save(
        tmp_path / "e/VOCdevkit/VOC2007/JPEGImages/2.jpg"
    )
    prints = [before, *(fingerprint(tmp_path / name) for name in "cde")]
    assert len(set(prints)) == 4


def test_fingerprints_of_earlier_stores_still_hold():
    record = Record(
        id="000005",
        image=None,
        image_bytes=1234,
        height=50,
        width=60,
        labels=np.array([1, 0, -1], np.int8),
        boxes=np.array([[0, 1.5, 30, 40]], np.float32),
        box_classes=np.array([0]),
        box_difficult=np.array([False]),
    )
    data = Dataset("voc2007", ("a", "b", "c"), "multi-label", {"train": (record,)})
    assert data.fingerprint("train") == "ae7da8654d3906f12feade3588741b3d9a330e9cab8be9186a2130992d08e17d"


def write_masks(home, image_id, class_indices, object_indices):
    """Write uint8 [50, 60] as VOC's palette images."""
    for kind, indices in (("SegmentationClass", class_indices), ("SegmentationObject", object_indices)):
        (home / kind).mkdir(exist_ok=True)
        image = Image.fromarray(indices)
        image.putpalette(bytes(range(256)) * 3)
        image.save(home / kind / f"{image_id}.png")


def test_masks_are_read_where_there_are_some(tmp_path):
    dog, cat = ("dog", False, (1, 1, 20, 20)), ("cat", True, (31, 11, 40, 20))
    home = write_voc(tmp_path, {"1": [dog, cat], "2": [dog]})
    objects, classes = np.zeros((50, 60), np.uint8), np.zeros((50, 60), np.uint8)
    objects[0:20, 0:20], objects[10:20, 30:40] = 1, 2
    classes[objects == 1], classes[objects == 2] = 12, 8
    objects[19], classes[19] = 255, 255
    write_masks(home, "1", classes, objects)
    first, second = read_dataset("voc", tmp_path, ["train"]).splits["train"]
    assert second.masks is None
    masks = first.masks.read()
    assert masks.dtype == bool and masks.shape == (2, 50, 60) and not masks[:, 19].any()
    for mask, label, box in zip(masks, first.box_classes, ([0, 0, 20, 19], [30, 10, 40, 19]), strict=True):
        rows, columns = mask.nonzero()
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
        assert (first.masks.read_classes()[mask] == label + 1).all()
    write_masks(home, "1", classes, np.full((50, 60), 3, np.uint8))
    with pytest.raises(BadInput, match=r"1\.png shows object 3, its annotation lists 2"):
        first.masks.read()
    (home / "SegmentationObject/1.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"unreadable segmentation mask .*1\.png"):
        first.masks.read()


def test_a_box_that_hangs_over_is_clipped_and_one_outside_is_named(tmp_path):
    write_voc(tmp_path, {"1": [("dog", False, (0, 1, 63, 49.5))]})
    assert read_dataset("voc", tmp_path, ["train"]).splits["train"][0].boxes.tolist() == [[0, 0, 60, 49.5]]
    write_voc(tmp_path, {"1": [("dog", False, (70, 1, 80, 20))]})
    with pytest.raises(BadInput, match=r"1\.jpg: box \[69.0, 0.0, 80.0, 20.0\] .* has no pixel of its 60x50"):
        read_dataset("voc", tmp_path, ["train"])


def test_an_archive_still_packed_is_named(tmp_path):
    (tmp_path / "VOCtrainval_06-Nov-2007.tar").write_bytes(b"")
    with pytest.raises(
        BadInput, match=r"no VOC2007 in .*; unpack .*VOCtrainval_06-Nov-2007\.tar; expected this layout"
    ):
        read_dataset("voc", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda home: (home / "JPEGImages/1.jpg").unlink(), r"image not found: .*1\.jpg"),
        (lambda home: (home / "Annotations/1.xml").unlink(), r"annotation not found: .*1\.xml"),
        (lambda home: (home / "Annotations/1.xml").write_text("<annotation><size>"), r"broken XML in .*1\.xml"),
        (lambda home: (home / "Annotations/1.xml").write_text("<annotation/>"), r"1\.xml: <size><height> is missing"),
        (lambda home: (home / "Annotations/1.xml").write_bytes(b"\xff\xfe\x00"), r"broken XML in .*1\.xml"),
        (lambda home: (home / "ImageSets/Main/train.txt").unlink(), r"split file not found: .*train\.txt"),
        (lambda home: (home / "ImageSets/Main/train.txt").write_text("\n"), r"split file is empty: .*train\.txt"),
        (lambda home: (home / "ImageSets/Main/train.txt").write_text("1\n1\n"), r"train\.txt lists '1' twice"),
        (lambda home: shutil.rmtree(home / "ImageSets"), r"expected this layout"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    home = write_voc(tmp_path, {"1": [("dog", False, (1, 1, 9, 9))]})
    damage(home)
    with pytest.raises(BadInput, match=message):
        read_dataset("voc", tmp_path, ["train"])


def test_inverted_box_is_named(tmp_path):
    write_voc(tmp_path, {"1": [("dog", False, (20, 1, 9, 9))]})
    with pytest.raises(BadInput, match=r"1\.xml: box of 'dog' has xmax < xmin"):
        read_dataset("voc", tmp_path, ["train"])


def test_unknown_dataset_suggests():
    with pytest.raises(BadInput, match="did you mean 'voc2007'"):
        read_dataset("voc2077")


def change(home, old, new):
    path = home / "Annotations/1.xml"
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("word", "label"),
    [("0", 1), ("1", -1), ("false", 1), ("True", -1), ("Unspecified", 1), ("", 1), (" 0\n", 1), ("yes", -1), (None, 1)],
)
def test_difficult_as_programs_write_it(tmp_path, word, label):
    home = write_voc(tmp_path, {"1": [("dog", True, (1, 1, 9, 9))]})
    change(home, "<difficult>1</difficult>", "" if word is None else f"<difficult>{word}</difficult>")
    (record,) = read_dataset("voc", tmp_path, ["train"]).splits["train"]
    assert record.labels[11] == label and record.box_difficult.tolist() == [label == -1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<difficult>0<", "<difficult>maybe<", "<difficult> of object 1 is 'maybe', expected 0, 1, true, false or"),
        ("<height>50<", "<height>tall<", "<size><height> is 'tall', expected a whole number"),
        ("<xmin>1<", "<xmin>left<", "<bndbox><xmin> of object 1 is 'left', expected a number"),
        ("<name>dog<", "<name> <", "<name> of object 1 is '', expected the name of a class"),
        ("bndbox>", "polygon>", "<bndbox><xmin> of object 1 is missing, expected a number"),
    ],
)
def test_the_field_at_fault_is_named_with_its_value(tmp_path, old, new, message):
    home = write_voc(tmp_path, {"1": [("dog", False, (1, 1, 9, 9))]})
    path = home / "Annotations/1.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadInput, match=rf"1\.xml: {message}"):
        read_dataset("voc", tmp_path, ["train"])


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path):
    home = write_voc(tmp_path, {"1": [("dog", False, (1, 1, 9, 9))]})
    for path in (home / "ImageSets/Main/train.txt", home / "Annotations/1.xml"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [r.id for r in read_dataset("voc", tmp_path, ["train"]).splits["train"]] == ["1"]


def test_masks_of_another_size_are_named(tmp_path):
    home = write_voc(tmp_path, {"1": [("dog", False, (1, 1, 9, 9))]})
    write_masks(home, "1", np.zeros((50, 60), np.uint8), np.zeros((60, 50), np.uint8))
    (record,) = read_dataset("voc", tmp_path, ["train"]).splits["train"]
    with pytest.raises(BadInput, match=r"SegmentationObject/1\.png is 50x60 pixels, .* says 60x50"):
        record.masks.read()
    assert record.masks.read_classes().shape == (50, 60)
