"""Every dataset layout from disk to a store, and what is wrong with the plainer ones named."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
from folders import CHECKOUT
from layouts import LAYOUTS, folder, inaturalist2018, places205, save
from torchvision.datasets import ImageFolder

import featcache
from featcache.datasets import DATASETS, read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput

FOLDERS = sorted(set(DATASETS) - {"manifest"})


def test_every_name_has_a_layout_here():
    assert set(DATASETS) == set(LAYOUTS) | {"voc", "voc2007", "voc2012", "coco2014"}


def test_help_and_docs_name_every_dataset(command):
    text = command("extract", "--help")[1]
    page = (CHECKOUT / "docs" / "datasets.md").read_text()
    assert [name for name in DATASETS if f"`{name}`" not in page] == []
    # The help says voc (2007) and coco (2014).
    assert {name for name in DATASETS if not re.search(rf"\b{name}\b", text)} == {"voc2007", "coco2014"}


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"coco2017", "cifar100"}))
def test_extract_writes_what_the_layout_says(name, tmp_path, command):
    root, expected = LAYOUTS[name](tmp_path / "data")
    # Those that keep files open in a process must do so in another one too.
    workers = 1 if name in ("huggingface", "webdataset") else 0
    words = ("--backbone", "random", "--arch", "resnet18", "--size", 32, "--workers", workers, "--features", "pooled")
    code, _, err = command("extract", *words, "--dataset", name, "--root", root, "--store", tmp_path / "s.zarr")
    assert code == 0, err
    store = featcache.open_store(tmp_path / "s.zarr")
    assert {s: list(zip(store[s].ids, store[s].labels.tolist(), strict=True)) for s in store.splits} == expected
    assert store.task == ("multi-label" if name == "coco" else "single-label")
    sizes = {s: [(i.height, i.width) for i in map(open_image, images(root, name, s))] for s in store.splits}
    assert {s: list(map(tuple, store[s].sizes.tolist())) for s in store.splits} == sizes


def images(root, name, split):
    return [record.image for record in read_dataset(name, root, [split]).splits[split]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_records_pickle_and_keep_their_fingerprint(name, tmp_path):
    root, expected = LAYOUTS[name](tmp_path / "data")
    data = read_dataset(name, root)
    for split, records in data.splits.items():
        assert [(r.id, r.labels if isinstance(r.labels, int) else r.labels.tolist()) for r in records] == expected[
            split
        ]
        # Worker processes get the records by pickle, wherever they are not forked.
        for record, again in zip(records, pickle.loads(pickle.dumps(records)), strict=True):
            image = open_image(record.image)
            assert np.array_equal(open_image(again.image), image) and np.ptp(np.asarray(image)) > 0
            assert (record.width, record.height) == image.size and record.image_bytes > 0
        assert data.fingerprint(split) == read_dataset(name, root, [split]).fingerprint(split)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_root_is_named(name, tmp_path):
    with pytest.raises(BadInput, match=f"dataset folder not found: {tmp_path}/none"):
        read_dataset(name, tmp_path / "none")
    (tmp_path / "data.tar.gz").write_bytes(b"")
    with pytest.raises(BadInput, match=f"unpack {tmp_path}/data.tar.gz; expected this layout:\n  {tmp_path}/\n    "):
        read_dataset(name, tmp_path)


def test_folders_are_read_as_torchvision_does(tmp_path):
    folder(tmp_path)
    oracle = ImageFolder(tmp_path / "train")
    data = read_dataset("folder", tmp_path)
    assert data.classes == ("ant", "cat", "dog"), "of all splits together, so that one index means one class"
    found = [(r.image, data.classes[r.labels]) for r in data.splits["train"]]
    assert found == [(path, oracle.classes[label]) for path, label in oracle.samples]
    one = read_dataset("folder", tmp_path / "train")
    assert [(r.image, r.labels) for r in one.splits["all"]] == oracle.samples and list(one.classes) == oracle.classes


def test_folders_that_are_none(tmp_path):
    save(tmp_path / "train" / "1.jpg", 1)
    with pytest.raises(BadInput, match="train holds images, but no class folders; expected"):
        read_dataset("folder", tmp_path)
    shutil.rmtree(tmp_path / "train")
    folder(tmp_path)
    (tmp_path / "notes" / "xml").mkdir(parents=True)
    assert list(read_dataset("folder", tmp_path).splits) == ["train", "val"]
    (tmp_path / "val" / "bee").mkdir()
    with pytest.raises(BadInput, match="class folder without an image: .*val/bee"):
        read_dataset("folder", tmp_path)
    with pytest.raises(BadInput, match=r"has no split 'test' \(it has train, val\)"):
        read_dataset("folder", tmp_path, ["test"])


def test_places205_lists(tmp_path):
    places205(tmp_path)
    assert read_dataset("places205", tmp_path).classes == ("a/abbey", "y/yard")
    path = tmp_path / "trainvalsplit_places205/train_places205.csv"
    for text, message in (
        ("a/abbey/gsun_1.jpg,0\nb/bar/gsun_2.jpg,0\n", r"csv line 2: b/bar/gsun_2.jpg has the label 0 of a/abbey"),
        ("a/abbey/gsun_1.jpg\n", "line 1: a/abbey/gsun_1.jpg needs a label from 0 to 204"),
        ("a/abbey/gsun_1.jpg,205\n", "line 1: a/abbey/gsun_1.jpg needs a label from 0 to 204"),
        ("a/abbey/none.jpg,0\n", "image not found: a/abbey/none.jpg anywhere"),
        ("a/abbey/gsun_1.jpg,0\na/abbey/none.jpg,0\n", "image not found: .*images256/a/abbey/none.jpg"),
        ("\n", "csv is empty"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            read_dataset("places205", tmp_path)


def test_inaturalist_annotations(tmp_path):
    inaturalist2018(tmp_path)
    assert read_dataset("inaturalist2018", tmp_path).classes == ("Anas", "Corvus")
    path = tmp_path / "val2018.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"annotations": []}, r"val2018\.json: image 5 has no annotation"),
        ({"annotations": [{"image_id": 5, "category_id": 7}]}, r"annotation 0 has an unknown category_id: 7"),
        (
            {"categories": whole["categories"][:1] + [{"id": 1, "name": "Pica"}]},
            "its categories are not those of train",
        ),
        ({"images": 3}, "'images' must be a list with entries"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(BadInput, match=message):
            read_dataset("inaturalist2018", tmp_path)
    path.write_text('{"images":\n [,')
    with pytest.raises(BadInput, match=r"broken JSON in .*val2018\.json, line 2"):
        read_dataset("inaturalist2018", tmp_path)


def test_lists_name_classes_by_folders_or_numbers(tmp_path):
    root, expected = LAYOUTS["lists"](tmp_path)
    assert read_dataset("lists", root).classes == ("emu", "kea")
    flat = tmp_path / "Flat"
    for number in (1, 2):
        save(flat / "train" / f"{number}.png", number)
    (flat / "train.txt").write_text("1.png 3\n2.png 0\n")
    data = read_dataset("lists", flat)
    assert data.classes == ("0", "1", "2", "3") and list(data.splits) == ["train"]
    assert [record.labels for record in data.splits["train"]] == [3, 0]
    for text, message in (
        ("1.png\n", "1.png needs a label"),
        ("1.png -1\n", "needs a label, a number from 0"),
        ("9.png 0\n", "image not found: 9.png"),
    ):
        (flat / "train.txt").write_text(text)
        with pytest.raises(BadInput, match=message):
            read_dataset("lists", flat)
