"""A manifest in its three formats and three ways to label; whatever is wrong in it is named by its line."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import manifest, save

from featcache.datasets import read_dataset
from featcache.errors import BadInput


@pytest.fixture
def images(tmp_path):
    """A folder with 1.jpg to 3.jpg."""
    for n in (1, 2, 3):
        save(tmp_path / f"{n}.jpg", n)
    return tmp_path


def read(folder, text, name="list.csv", splits=None):
    path = folder / name
    path.write_text(text)
    return read_dataset("manifest", path, splits)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_formats_say_the_same(tmp_path, kind):
    path, expected = manifest(tmp_path, kind)
    data = read_dataset("manifest", path)
    assert {s: [(r.id, r.labels) for r in records] for s, records in data.splits.items()} == expected
    assert (data.classes, data.task, data.resize) == (("ant", "cat", "dog"), "single-label", "crop")
    assert read_dataset("manifest", path, ["test"]).classes == data.classes, "classes are those of the whole file"


def test_indices_names_and_defaults(images):
    data = read(images, "path,label\n2.jpg,3\n1.jpg,0\n")
    assert data.classes == ("0", "1", "2", "3") and [r.labels for r in data.splits["all"]] == [3, 0]
    assert [r.id for r in data.splits["all"]] == ["2.jpg", "1.jpg"]
    data = read(images, '{"path": "1.jpg", "label": "b", "id": 0}\n\n{"path": "2.jpg", "label": "a"}\n', "l.jsonl")
    assert [(r.id, r.labels) for r in data.splits["all"]] == [("0", 1), ("2.jpg", 0)]


def test_three_ways_to_several_labels(images):
    for text, name in (
        ("path,labels\n1.jpg,dog;ant\n2.jpg,\n", "a.csv"),
        ('{"path": "1.jpg", "labels": ["dog", "ant"]}\n{"path": "2.jpg", "labels": []}\n', "a.jsonl"),
        # The first column is how a table's row numbers are often written.
        (",path,ant,dog\n0,1.jpg,1,1\n1,2.jpg,0,0\n", "b.csv"),
    ):
        data = read(images, text, name)
        assert (data.classes, data.task, data.resize) == (("ant", "dog"), "multi-label", "squash")
        assert data.labels("all").tolist() == [[1, 1], [0, 0]] and data.labels("all").dtype == np.int8
    assert read(images, "path,ant\n1.jpg,-1\n").labels("all").tolist() == [[-1]]


def test_boxes(images):
    boxes = [{"box": [1, 2, 30, 99], "label": "dog"}, {"box": [0, 0, 5, 5], "label": 0, "difficult": True}]
    (record,) = read(images, json.dumps({"path": "1.jpg", "labels": ["ant", "dog"], "boxes": boxes}), "a.jsonl").splits[
        "all"
    ]
    assert record.boxes.tolist() == [[1, 2, 30, 30], [0, 0, 5, 5]], "30 pixels high: clipped"
    assert record.box_classes.tolist() == [1, 0] and record.box_difficult.tolist() == [False, True]


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names.filter(lambda n: not n.removeprefix("-").isdecimal()), names), min_size=1, max_size=5))
def test_any_names_come_back(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("manifest")
    save(folder / "1.jpg", 1)
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label", "id", "split")])
        writer.writerows(("1.jpg", label, f"{n}{image_id}", "s") for n, (label, image_id) in enumerate(drawn))
    data = read_dataset("manifest", folder / "list.csv")
    assert data.classes == tuple(sorted({label for label, _ in drawn}))
    found = [(data.classes[r.labels], r.id) for r in data.splits["s"]]
    assert found == [(label, f"{n}{image_id}") for n, (label, image_id) in enumerate(drawn)]


BOX = '{"path": "1.jpg", "label": "a", "boxes": %s}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\n1.jpg,0\n2.jpg,-1\n", r"a\.csv line 3: label -1 is out of range"),
        ("a.csv", "path,label\n1.jpg,0\n2.jpg,10000000\n", "line 3: label 10000000 is out of range"),
        ("a.csv", "path,label\n1.jpg,0\n2.jpg,cat\n", "line 3: label 'cat' is a name, where other images have class"),
        ("a.csv", "path,label\n1.jpg,0\n2.jpg,\n", "line 3: label '' is neither a class index nor a name"),
        ("a.csv", "path,label\n1.jpg,0,7\n", "line 2: line 1 has 2 columns"),
        ("a.csv", "path,label\n1.jpg\n", "line 2: line 1 has 2 columns"),
        ("a.csv", "path,path,label\n1.jpg,1,2\n", "line 1: a column comes twice"),
        ("a.csv", "file,label\n1.jpg,0\n", r"line 2: no path \(columns: path, then"),
        ("a.csv", "path\n1.jpg\n", "has no labels"),
        ("a.csv", "path,cat,dog\n1.jpg,1,2\n", "line 2: column 'dog' is '2', not 0, 1 or -1"),
        ("a.csv", "path,label,labels\n1.jpg,1,2\n", "both a label and a labels column"),
        ("a.csv", "", "lists no image"),
        ("a.csv", 'path,label\n"1.jpg,0\n', "cannot read manifest"),
        ("a.csv", "path,label\nnone.jpg,0\n", "image not found: .*none.jpg"),
        ("a.csv", "path,label,split\n1.jpg,0,dev\n", r"has no split 'train' \(it has dev\)"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0}\n{"path"\n', "broken JSON in .*, line 2"),
        ("a.jsonl", "[1]\n", "line 1: not an object"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0.5}\n', "line 1: label 0.5 is neither"),
        ("a.jsonl", '{"path": "1.jpg", "label": true}\n', "line 1: label True is neither"),
        ("a.jsonl", '{"path": "1.jpg", "label": [1]}\n{"path": "2.jpg", "label": 1}', "line 2: one label, where other"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3], "label": "a"}]', "line 1: boxes must be a list"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4], "label": "b"}]', "line 1: boxes must be a list"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4], "label": 4}]', "line 1: a box's label is out of range"),
        ("a.jsonl", BOX % '[{"box": [50, 2, 60, 4], "label": "a"}]', "has no pixel of its 40x30"),
        ("a.jsonl", BOX % '[{"box": [NaN, 2, 60, 4], "label": "a"}]', "has no pixel of its 40x30"),
        ("a.parquet", "nonsense", "cannot read manifest"),
        ("a.txt", "1.jpg 0\n", r"is no \.csv, \.jsonl, \.parquet file"),
    ],
)
def test_what_is_wrong_is_named(images, name, text, message):
    with pytest.raises(BadInput, match=message):
        read(images, text, name, splits=["train"] if "split" in text else None)


def test_the_file_must_be_given(tmp_path):
    with pytest.raises(
        BadInput, match=r"manifest not found: .* \(give the \.csv, \.jsonl or \.parquet file with --root\)"
    ):
        read_dataset("manifest", tmp_path)
