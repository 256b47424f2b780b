"""`featcache inspect --dataset`: every count, every damaged image, every copy."""

import shutil
import sys

import pytest
from layouts import LAYOUTS, picture, save, write_coco, write_tar, write_voc

import featcache
from featcache.datasets import read_dataset
from featcache.errors import BadInput


def test_counts_of_boxes_flags_and_classes(tmp_path, command):
    write_voc(tmp_path, {"1": [("dog", True, (1, 1, 9, 9)), ("cat", False, (0, 1, 9, 99))]})
    code, out, _ = command("inspect", "--dataset", "voc", "--root", tmp_path, "--split", "train")
    tables = [line.split() for line in out.splitlines()]
    assert code == 0 and ["dataset:", "voc2007,", "multi-label,", "20", "classes"] in tables
    #                     images boxes difficult crowd overhanging masks copies
    assert ["train", "1", "2", "1", "0", "1", "0", "0"] in tables
    assert ["train", "height", "50", "50", "50"] in tables and ["train", "width", "60", "60", "60"] in tables
    assert ["class", "train", "train", "difficult"] in tables
    assert ["dog", "0", "1"] in tables and ["cat", "1", "0"] in tables
    crowd = {"bbox": [1, 1, 9, 9], "area": 81, "category_id": 1, "iscrowd": 1}
    crowd["segmentation"] = {"counts": [0, 300, 900], "size": [30, 40]}
    write_coco(tmp_path / "coco", {1: [crowd, crowd]})
    found = featcache.inspect_dataset("coco", tmp_path / "coco", ["val"])
    assert (found.splits["val"].crowd, found.splits["val"].masks, found.damaged) == (2, 1, False)


def test_damage_copies_and_leaks_are_listed(tmp_path, command):
    LAYOUTS["folder"](tmp_path)
    shutil.copy(tmp_path / "train/cat/b.jpg", tmp_path / "val/ant/leaked.jpg")
    shutil.copy(tmp_path / "train/cat/b.jpg", tmp_path / "train/dog/copied.jpg")
    (tmp_path / "val/ant/empty.png").write_bytes(b"")
    content = (tmp_path / "train/dog/1.jpeg").read_bytes()
    (tmp_path / "train/dog/1.jpeg").write_bytes(content[:-50])
    assert len(read_dataset("folder", tmp_path, ["train"]).splits["train"]) == 4, "its header is whole"
    code, out, err = command("inspect", "--dataset", "folder", "--root", tmp_path)
    assert code == 1 and "Traceback" not in err
    assert "leak: train cat/b.jpg has the same bytes as val ant/leaked.jpg" in out
    assert f"val ant/empty.png: unreadable image {tmp_path}/val/ant/empty.png: the file is empty" in out
    assert f"train dog/1.jpeg: unreadable image {tmp_path}/train/dog/1.jpeg: " in out and "truncated" in out
    tables = [line.split() for line in out.splitlines()]
    assert ["train", "4", "0", "0", "0", "0", "0", "1"] in tables


def test_what_the_annotation_says_is_checked(tmp_path, command):
    home = write_voc(tmp_path, {"1": [], "2": [], "3": [("dog", False, (100, 1, 110, 9))]})
    picture(1).save(home / "JPEGImages/1.jpg")
    (home / "JPEGImages/2.jpg").unlink()
    code, out, _ = command("inspect", "--dataset", "voc", "--root", tmp_path, "--split", "train")
    assert code == 1
    assert "1.jpg is 40x30 pixels, its annotation says 60x50" in out
    assert f"train 2: image not found: {home}/JPEGImages/2.jpg" in out
    assert "3.jpg: box [99.0, 0.0, 110.0, 9.0]" in out


def test_an_id_that_comes_twice(tmp_path, command):
    (tmp_path / "list.csv").write_text("path,label,id\n1.jpg,a,x\n2.jpg,b,x\n")
    for n in (1, 2):
        save(tmp_path / f"{n}.jpg", n)
    code, out, _ = command("inspect", "--dataset", "manifest", "--root", tmp_path / "list.csv")
    assert code == 1 and "all: id x comes twice" in out
    with pytest.raises(BadInput, match="manifest, split all: id 'x' comes twice"):
        read_dataset("manifest", tmp_path / "list.csv")


def test_many_classes_and_many_leaks_are_summed_up(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys.modules["featcache.cli.inspect"], "LISTED_CLASSES", 2)
    monkeypatch.setattr(sys.modules["featcache.cli.inspect"], "LISTED_LEAKS", 1)
    for split in ("train", "val"):
        for n, name in enumerate(("a", "b", "b", "c")):
            save(tmp_path / split / name / f"{n}.jpg", n)
    code, out, _ = command("inspect", "--dataset", "folder", "--root", tmp_path)
    assert code == 0 and "commonest of 3: b" in out and out.count("has the same bytes") == 1
    assert "leak: 3 more images are in two splits" in out


def test_sources_without_files_are_looked_at_too(tmp_path):
    shard = {"1.jpg": b"no image", "1.cls": b"0", "2.jpg": b"", "2.cls": b"1"}
    write_tar(tmp_path / "train-0000.tar", shard)
    found = featcache.inspect_dataset("webdataset", tmp_path)
    (first, reason), (second, empty) = found.splits["train"].bad
    assert first == "1" and reason.startswith(f"unreadable image {tmp_path}/train-0000.tar:1.jpg: not an image")
    assert second == "2" and empty.endswith("2.jpg: the file is empty")


def test_a_store_or_a_dataset(tmp_path, command):
    for words in ((), ("x.zarr", "--dataset", "voc")):
        code, _, err = command("inspect", *words)
        assert code == 2 and "give either a STORE or --dataset NAME" in err
    code, _, err = command("inspect", "x.zarr", "--split", "train")
    assert code == 2 and "--root and --split go with --dataset" in err
    code, _, err = command("inspect", "--dataset", "voc", "--root", tmp_path / "none")
    assert code == 2 and "dataset folder not found" in err
