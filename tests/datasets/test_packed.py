"""Datasets whose images lie inside larger files: WebDataset shards and saved Hugging Face datasets."""

import shutil
import sys

import datasets
import numpy as np
import pytest
from layouts import encoded, huggingface, picture, webdataset, write_tar

from featcache.datasets import read_dataset
from featcache.datasets.image import measure_image, open_image
from featcache.datasets.sources import TarMember, open_source
from featcache.errors import BadInput


def rows(name, root):
    data = read_dataset(name, root)
    return {split: [(r.id, r.labels) for r in records] for split, records in data.splits.items()}


def test_a_tar_member_is_the_file_and_its_header_costs_little(tmp_path, monkeypatch):
    content = encoded(5, "PNG") + bytes(300_000)
    write_tar(tmp_path / "a.tar", {"0.cls": b"0", "0.png": content, "1.cls": b"1", "1.jpg": encoded(1)})
    data = read_dataset("webdataset", tmp_path)
    first, second = data.splits["a"]
    with open_source(first.image) as file:
        assert file.read() == content and file.read() == b""
        assert file.seek(-5, 2) == len(content) - 5 and file.read(9) == bytes(5)
    assert first.image_bytes == len(content) and (first.height, first.width) == (30, 40)
    read = []
    slices = sys.modules["featcache.datasets.sources"]._Slice
    readinto = slices.readinto
    monkeypatch.setattr(slices, "readinto", lambda self, buffer: read.append(readinto(self, buffer)) or read[-1])
    measure_image(first.image)
    assert 0 < sum(read) < len(content) / 4


def test_shards_in_one_folder_are_split_by_their_names(tmp_path):
    shard = {"1.jpg": encoded(1), "1.cls": b"0"}
    names = ("set-train-000000-of-000002", "set-train-000001-of-000002", "set-validation-00")
    for n, name in enumerate(names):
        write_tar(tmp_path / f"{name}.tar", {k.replace("1", str(n)): v for k, v in shard.items()})
    assert rows("webdataset", tmp_path) == {"train": [("0", 0), ("1", 0)], "validation": [("2", 0)]}
    write_tar(tmp_path / "b" / "00000.tar", shard)
    assert rows("webdataset", tmp_path / "b") == {"all": [("1", 0)]}


def test_keys_that_begin_anew_in_each_shard(tmp_path):
    for shard in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{shard}.tar", {"0.jpg": encoded(1), "0.cls": b"0"})
    assert rows("webdataset", tmp_path) == {"train": [("train-0/0", 0), ("train-1/0", 0)], "val": [("0", 0)]}


def test_labels_of_several_kinds(tmp_path):
    def label(suffix, content):
        write_tar(tmp_path / "s.tar", {"1.jpg": encoded(1), f"1.{suffix}": content})
        data = read_dataset("webdataset", tmp_path)
        return data.classes, data.labels("s").tolist()

    assert label("txt", b"a cat\n") == (("a cat",), [0])
    assert label("txt", b"\xef\xbb\xbfa cat\n") == (("a cat",), [0])
    assert label("txt", b'["b", "a"]') == label("txt", b"['a', 'b']") == (("a", "b"), [[1, 1]])
    assert label("cls", b"0 2") == (("0", "1", "2"), [[1, 0, 1]])
    assert label("json", b'{"label": 2}') == (("0", "1", "2"), [2])
    assert label("json", b'{"labels": ["b", "a"]}') == (("a", "b"), [[1, 1]])
    for suffix, content, message in (
        ("json", b"{", r"1\.json, line 1: Expecting"),
        ("json", b"{}", "1 has no label"),
        ("png", b"", "1 has no label"),
        ("cls", b"\xff", "1.cls: 'utf-8'"),
        ("cls", b"-1", "label -1 is out of range"),
    ):
        with pytest.raises(BadInput, match=message):
            label(suffix, content)


def test_a_damaged_shard_is_named(tmp_path):
    webdataset(tmp_path)
    path = tmp_path / "train" / "0000.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in (0, 100, 600, 1500, end // 512 * 512 + 512):
        path.write_bytes(content[:size])
        with pytest.raises(BadInput, match="0000.tar is (no whole, uncompressed tar|cut off)"):
            read_dataset("webdataset", tmp_path)
    path.write_bytes(b"\x1f\x8b\x08\x00" + content)
    with pytest.raises(BadInput, match="is no whole, uncompressed tar"):
        read_dataset("webdataset", tmp_path)
    shutil.rmtree(tmp_path / "train"), shutil.rmtree(tmp_path / "val")
    (tmp_path / "shards.zip").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no tar shards in .*; unpack .*shards.zip; expected this layout"):
        read_dataset("webdataset", tmp_path)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def save_rows(root, labels, feature, **columns):
    cells = {"image": [picture(n) for n in range(len(labels))], "label": labels, **columns}
    features = datasets.Features(
        {"image": datasets.Image(), "label": feature, **{c: datasets.Image() for c in columns}}
    )
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(str(root))


def test_one_saved_dataset_is_one_split(tmp_path):
    save_rows(tmp_path / "a", [[0, 1], []], datasets.List(datasets.ClassLabel(names=["cat", "dog"])))
    data = read_dataset("huggingface", tmp_path / "a")
    assert (data.classes, data.task) == (("cat", "dog"), "multi-label") and data.labels("all").tolist() == [
        [1, 1],
        [0, 0],
    ]
    save_rows(tmp_path / "c", ["ant,zebra", "ant", "zebra"], datasets.Value("string"))
    data = read_dataset("huggingface", tmp_path / "c")
    assert data.classes == ("ant", "zebra") and data.labels("all").tolist() == [[1, 1], [1, 0], [0, 1]]
    save_rows(tmp_path / "b", ["zebra", "ant"], datasets.Value("string"))
    data = read_dataset("huggingface", tmp_path / "b")
    assert data.classes == ("ant", "zebra") and data.labels("all").tolist() == [1, 0]
    for record, n in zip(data.splits["all"], (0, 1), strict=True):
        assert np.array_equal(open_image(record.image), picture(n))


def test_what_a_saved_dataset_lacks_is_named(tmp_path, monkeypatch):
    save_rows(tmp_path / "a", [0, -1], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(BadInput, match="all row 1: label -1 is out of range, there are 2 classes"):
        read_dataset("huggingface", tmp_path / "a")
    save_rows(tmp_path / "b", [0], datasets.Value("int64"), other=[picture(1)])
    with pytest.raises(
        BadInput, match=r"needs one Image column .*; it holds image \(Image\), label \(Value\), other \(Im"
    ):
        read_dataset("huggingface", tmp_path / "b")
    with pytest.raises(BadInput, match="no saved Hugging Face dataset in .*expected this layout"):
        read_dataset("huggingface", tmp_path)
    huggingface(tmp_path / "c")
    next((tmp_path / "c" / "train").glob("*.arrow")).unlink()
    with pytest.raises(BadInput, match="cannot read the Hugging Face dataset"):
        read_dataset("huggingface", tmp_path / "c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'featcache\[huggingface\]'"):
        read_dataset("huggingface", tmp_path / "a")


def test_a_slice_of_a_file_that_shrank_ends_where_the_file_does(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    with TarMember(str(tmp_path / "a.tar"), "x", 4, 100).open() as file:
        assert file.read() == b"456789"
