"""ImageNet in all its layouts: the same labels as torchvision's ImageFolder, and lists that contradict are refused."""

import numpy as np
import pytest
from layouts import WNIDS, imagenet, imagenet_flat, imagenet_meta, save, write_imagenet_train
from scipy.io import savemat
from torchvision.datasets import ImageFolder

from featcache.datasets import list_records, read_dataset
from featcache.errors import BadInput


def rows(root, split):
    return [(r.id, r.labels) for r in read_dataset("imagenet", root, [split]).splits[split]]


def test_class_folders_are_read_as_torchvision_does(tmp_path):
    imagenet(tmp_path)
    oracle = ImageFolder(tmp_path / "train")
    data = read_dataset("imagenet", tmp_path, ["train"])
    assert list(data.classes) == oracle.classes == list(WNIDS) and data.resize == "crop"
    assert [(r.image, r.labels) for r in data.splits["train"]] == oracle.samples


@pytest.mark.parametrize("place", ["meta/val.txt", "val.txt", "val_labeled.txt", "../meta/ImageNet/val_labeled.txt"])
def test_a_flat_folder_with_a_list(tmp_path, place):
    root, expected = imagenet_meta(tmp_path / "ImageNet")
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / "meta/val.txt").rename(path)
    assert rows(root, "val") == expected["val"]


def test_a_list_goes_before_the_class_folders(tmp_path):
    imagenet(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/val.txt").write_text("ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000003.JPEG 0\n")
    assert rows(tmp_path, "val") == [("ILSVRC2012_val_00000001", 2), ("ILSVRC2012_val_00000003", 0)]
    (tmp_path / "meta/val.txt").write_text("n02123045/ILSVRC2012_val_00000001.JPEG 2\n")
    assert rows(tmp_path, "val") == [("ILSVRC2012_val_00000001", 2)]


def write_devkit(root, numbers, ids):
    """The devkit's data folder; ids: {ILSVRC2012_ID: wnid}."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in numbers))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    leaves = [(n, wnid, "words", "gloss", 0) for n, wnid in ids.items()]
    return data, np.array([*leaves, (1001, "n00001740", "entity", "not a leaf", 3)], dtype=kinds)


@pytest.mark.parametrize("way", ["meta.mat", "map_clsloc.txt"])
def test_the_devkit_numbers_classes_in_its_own_order(tmp_path, way):
    root, expected = imagenet_flat(tmp_path)
    ids = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[1]}
    data, synsets = write_devkit(root, (1, 2, 3), ids)
    if way == "meta.mat":
        savemat(data / "meta.mat", {"synsets": synsets})
    else:
        (data / "map_clsloc.txt").write_text("".join(f"{wnid} {n} some_name\n" for n, wnid in ids.items()))
    assert rows(root, "val") == expected["val"]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    with pytest.raises(BadInput, match="has 2 lines, .* holds 3 images"):
        rows(root, "val")
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n4\n")
    with pytest.raises(BadInput, match="line 3: '4' is the number of no class"):
        rows(root, "val")


def test_the_devkit_without_synsets_is_named(tmp_path):
    root, _ = imagenet_flat(tmp_path)
    data, _ = write_devkit(root, (1, 2, 3), {})
    with pytest.raises(BadInput, match=r"meta\.mat, which is missing"):
        rows(root, "val")
    (data / "meta.mat").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match=r"cannot read .*meta\.mat"):
        rows(root, "val")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("1percent.txt", "{0}_2.JPEG\n{2}_10.JPEG\n"),
        ("train_labeled_1percent.txt", "{0}/{0}_2.JPEG 0\n{2}/{2}_10.JPEG 2\n"),
        ("meta/train_labeled_1percent.txt", "{0}/{0}_2.JPEG\n{2}/{2}_10.JPEG\n"),
    ],
)
def test_subset_lists(tmp_path, name, lines):
    imagenet(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / name).write_text(lines.format(*WNIDS))
    assert rows(tmp_path, "train-1percent") == [("n01440764_2", 0), ("n02123045_10", 2)]
    assert read_dataset("imagenet", tmp_path, ["train-1percent"]).classes == WNIDS
    with pytest.raises(BadInput, match="no list of the split train-10percent"):
        rows(tmp_path, "train-10percent")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ILSVRC2012_val_00000001.JPEG 3", r"val\.txt line 2: label 3 is out of range, there are 3 classes"),
        ("ILSVRC2012_val_00000001.JPEG two", r"val\.txt line 2: 'two' is no class index"),
        ("ILSVRC2012_val_00000001.JPEG", r"line 2: .* has no label, and no wnid"),
        ("n01443537/ILSVRC2012_val_00000001.JPEG 2", "line 2: label 2 is n02123045, the file is of n01443537"),
        ("n99999999/ILSVRC2012_val_00000001.JPEG 2", "line 2: n99999999 is none of the 3 classes"),
        ("ILSVRC2012_val_00000009.JPEG 1", "image not found: .*00000009"),
        ("ILSVRC2012_val_00000003.JPEG 1", "id 'ILSVRC2012_val_00000003' comes twice"),
    ],
)
def test_a_list_with_a_wrong_line(tmp_path, line, message):
    root, _ = imagenet_flat(tmp_path)
    (root / "val.txt").write_text(f"ILSVRC2012_val_00000003.JPEG 0\n{line}\n")
    with pytest.raises(BadInput, match=message):
        rows(root, "val")


def test_what_is_half_unpacked_is_named(tmp_path):
    write_imagenet_train(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no folder .*val; unpack .*ILSVRC2012_img_val\.tar; expected this layout"):
        read_dataset("imagenet", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(BadInput, match=r"no labels of .*val"):
        read_dataset("imagenet", tmp_path)
    (tmp_path / "train" / f"{WNIDS[0]}.tar").write_bytes(b"")
    assert len(rows(tmp_path, "train")) == 6, "an archive that was unpacked may stay"
    (tmp_path / "train/n02999999.tar").write_bytes(b"")
    with pytest.raises(BadInput, match="train is only half unpacked; unpack .*tar"):
        rows(tmp_path, "train")


def test_validation_images_sorted_halfway(tmp_path):
    imagenet(tmp_path)
    save(tmp_path / "val/ILSVRC2012_val_00000009.JPEG", 9)
    with pytest.raises(BadInput, match="holds images beside class folders"):
        rows(tmp_path, "val")
    with pytest.raises(BadInput, match="imagenet has no split 'test'"):
        rows(tmp_path, "test")
    with pytest.raises(BadInput, match=r"cannot tell ImageNet's classes in"):
        rows(tmp_path / "train" / WNIDS[0], "train")


@pytest.mark.parametrize("meta", ["meta/ImageNet100", "../meta/ImageNet100"])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_imagenet100_takes_classes_and_labels_from_its_lists(tmp_path, meta, prefix):
    """As OpenMixup has them: lists of some classes of a whole ImageNet, numbered anew."""
    root = tmp_path / "ImageNet"
    imagenet(root)
    images = sorted(path.relative_to(root / "train").as_posix() for path in (root / "train").rglob("*.JPEG"))
    chosen = [(image, {WNIDS[2]: 0, WNIDS[0]: 1}[image.split("/")[0]]) for image in images if WNIDS[1] not in image]
    (root / meta).mkdir(parents=True)
    lines = "".join(f"{prefix}{image} {label}\n" for image, label in chosen)
    (root / meta / "train_labeled_full.txt").write_text(lines)
    (root / meta / "val_labeled.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n")
    data = read_dataset("imagenet100", root, ["train"])
    assert data.classes == (WNIDS[2], WNIDS[0]) and data.resize == "crop"
    assert [(r.image, r.labels) for r in data.splits["train"]] == [(str(root / "train" / i), n) for i, n in chosen]
    val = list_records("imagenet100", root, ["val"]).splits["val"]
    assert [(r.labels, r.id) for r in val] == [(0, "ILSVRC2012_val_00000001")]
    (root / meta / "train_labeled_full.txt").write_text(f"{lines}{WNIDS[1]}/x.JPEG 0\n")
    with pytest.raises(BadInput, match=f"line {len(chosen) + 1}: label 0 is {WNIDS[2]}, the file is of {WNIDS[1]}"):
        read_dataset("imagenet100", root)
    (root / meta / "train_labeled_full.txt").unlink()
    with pytest.raises(BadInput, match="no list of ImageNet-100's split train"):
        read_dataset("imagenet100", root)
