"""A manifest in its three formats and three ways to label; whatever is wrong in it is named by its line."""

import csv
import json
import re

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
    boxes = [
        {"box": [1, 2, 30, 99], "label": "dog", "difficult": "false"},
        {"box": [0, 0, 5, 5], "label": 0, "difficult": True},
    ]
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
        writer.writerows([("path", "label:one", "id", "split")])
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
        ("a.csv", "path,labels:coma\n1.jpg,1\n", "a column 'labels:coma'; did you mean 'labels:comma'"),
        ("a.csv", "path,label\n1.jpg,['a' 'b']\n", "line 2: .* is no list as JSON or Python write it"),
        ("a.csv", 'path,label\n1.jpg,"[a, b]"\n', "line 2: .* is no list as JSON or Python write it"),
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
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4], "label": "a", "difficult": "maybe"}]', "'maybe' is no flag"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4], "label": 4}]', "line 1: a box's label is out of range"),
        ("a.jsonl", BOX % '[{"box": [50, 2, 60, 4], "label": "a"}]', "has no pixel of its 40x30"),
        ("a.jsonl", BOX % '[{"box": [NaN, 2, 60, 4], "label": "a"}]', r"\[nan, 2, 60, 4\] is no four numbers"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4, 5, 6, 7, 8], "label": "a"}]', r"6, ...\] is no four numbers"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 1e999, 4], "label": "a"}]', r"inf, 4\] is no four numbers"),
        ("a.jsonl", BOX % '[{"box": [1, 2, 3, 4], "label": true}]', "True is no class"),
        ("a.jsonl", BOX % "{}", r"\{\} is no list"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0, "split": "../../x"}', "has a slash in it"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0, "split": "commits"}', "is kept for other files"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0, "split": "train@1"}', "kept for the views"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0, "split": [1]}', r"split \[1\] is neither text"),
        ("a.jsonl", '{"path": "1.jpg", "label": 0, "id": "a\\u0000"}', "its id is not text"),
        ("a.jsonl", '{"path": "1.jpg", "label": %s}' % ("9" * 5000), "line 1: a number has too many digits"),
        ("a.jsonl", '{"path": "1.jpg", "label": %s}' % ("[" * 100_000), "line 1: it is nested too deeply"),
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


def write_column(folder, column, cells):
    """A manifest of one image with a row for each cell of its column of labels."""
    save(folder / "1.jpg", 1)
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "id", column), *(("1.jpg", n, cell) for n, cell in enumerate(cells))])
    return folder / "list.csv"


# Four of them are lists, of three classes; the fifth has no label.
LISTS = [["boat", "dog"], ["dog"], ["boat", "cat", "dog"], ["cat", "dog"], []]
MATRIX = [[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]]
SHARKS = ["great white shark, white shark", "tiger shark", "hammerhead, hammerhead shark", "ray"]


@pytest.mark.parametrize(
    ("column", "write", "said"),
    [
        ("label", ",".join, "'label' of .* is split at each comma: multi-label, 3 classes; if that is wrong"),
        ("label", " ; ".join, "'label' of .* is split at each semicolon: multi-label, 3 classes"),
        ("label", " | ".join, "'label' of .* is split at each bar: multi-label, 3 classes"),
        ("label", json.dumps, "'label' of .* holds lists: multi-label, 3 classes"),
        ("label", str, "'label' of .* holds lists: multi-label, 3 classes"),
        ("labels", ";".join, None),
        ("labels", ", ".join, "'labels' of .* is split at each comma: multi-label, 3 classes"),
        ("labels", "|".join, "'labels' of .* is split at each bar"),
        ("labels", " ".join, "'labels' of .* is split at each space: multi-label, 3 classes"),
        ("labels", json.dumps, "'labels' of .* holds lists"),
        ("labels:comma", ",".join, None),
        ("labels:semicolon", "; ".join, None),
        ("labels:bar", "|".join, None),
        ("labels:space", "  ".join, None),
    ],
)
def test_lists_are_split_and_it_is_said(tmp_path, capsys, column, write, said):
    data = read_dataset("manifest", write_column(tmp_path, column, map(write, LISTS)))
    assert (data.classes, data.task) == (("boat", "cat", "dog"), "multi-label")
    assert data.labels("all").tolist() == MATRIX
    err = capsys.readouterr().err
    assert re.search(f"^notice: column {said}", err) if said else not err


@pytest.mark.parametrize(
    ("column", "cells", "said"),
    [
        (
            "label",
            SHARKS,
            "'label' of .* is not split at each comma, which would give 6 classes: single-label, 4 classes",
        ),
        ("label:one", SHARKS, None),
        ("label:one", ["boat,dog", "dog", "boat", "[dog]", "boat;dog"], None),
        # Lists of words look like this, but so do names of two words: it is said and left.
        (
            "label",
            ["red dog", "red cat", "old dog", "old cat", "red", "old"],
            "'label' .* not split at each space, .* 4",
        ),
        ("label", ["hot dog", "great white shark"], None),
    ],
)
def test_one_name_is_never_split(tmp_path, capsys, column, cells, said):
    data = read_dataset("manifest", write_column(tmp_path, column, cells))
    assert data.task == "single-label" and [data.classes[r.labels] for r in data.splits["all"]] == cells
    err = capsys.readouterr().err
    assert re.search(f"^notice: column {said}", err) if said else not err


def test_numbers_with_something_between_them_are_indices(tmp_path, capsys):
    for cells in (["0 2", "1"], ["0,2", "1"], ["[0, 2]", "[1]"]):
        data = read_dataset("manifest", write_column(tmp_path, "label", cells))
        assert data.labels("all").tolist() == [[1, 0, 1], [0, 1, 0]] and data.classes == ("0", "1", "2")
        assert "multi-label, 3 classes" in capsys.readouterr().err


def test_images_and_classes_are_counted_and_odd_ones_named(tmp_path, command):
    for split, classes in {"train": "aabbc", "val": "ab"}.items():
        for n, label in enumerate(classes):
            save(tmp_path / split / label / f"{split}{n}.jpg", n + 10 * (split == "val"))
    words = ("--backbone", "random", "--arch", "resnet18", "--size", 32, "--workers", 0, "--store", tmp_path / "s.zarr")
    _, _, err = command("extract", *words, "--features", "pooled", "--dataset", "folder", "--root", tmp_path)
    code, out, _ = command("inspect", "--dataset", "folder", "--root", tmp_path)
    assert code == 0
    for line in (
        "dataset: folder, single-label, 3 classes",
        "train: 5 images, 3 classes",
        "val: 2 images, 2 classes",
        "warning: val lacks 1 of 3 classes: c",
        "warning: 1 class is seen only once in all splits: c (is a name misspelt, or a list of labels read as one name?)",
    ):
        assert line in err.splitlines() and line in out.splitlines()
