"""CIFAR and STL-10: the same pixels as torchvision reads, and a pickle that runs nothing."""

import os
import pickle

import numpy as np
import pytest
from layouts import LAYOUTS, cifar10, stl10, write_batch
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput


def unchecked(dataset):
    """torchvision's reader without its checksums of the published files."""
    return type("Unchecked", (dataset,), {"_check_integrity": lambda self: True, "meta": {**dataset.meta, "md5": None}})


@pytest.mark.parametrize(("name", "oracle"), [("cifar10", unchecked(CIFAR10)), ("cifar100", unchecked(CIFAR100))])
def test_cifar_agrees_with_torchvision(tmp_path, name, oracle):
    LAYOUTS[name](tmp_path)
    data = read_dataset(name, tmp_path)
    for split, records in data.splits.items():
        there = oracle(tmp_path, train=split == "train")
        assert list(data.classes) == there.classes
        for record, (image, label) in zip(records, there, strict=True):
            assert record.labels == label and np.array_equal(open_image(record.image), image)


def test_stl10_agrees_with_torchvision(tmp_path):
    stl10(tmp_path)
    oracle = type("Unchecked", (STL10,), {"_check_integrity": lambda self: True})
    for split, records in read_dataset("stl10", tmp_path).splits.items():
        for record, (image, label) in zip(records, oracle(tmp_path, split), strict=True):
            assert record.labels == label and np.array_equal(open_image(record.image), image)


def test_other_pixels_are_another_dataset(tmp_path):
    stl10(tmp_path)
    before = read_dataset("stl10", tmp_path).fingerprint("train")
    with open(tmp_path / "stl10_binary/train_X.bin", "r+b") as file:
        file.seek(5000)
        file.write(bytes(8))
    assert read_dataset("stl10", tmp_path).fingerprint("train") != before


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_malicious_batch_runs_nothing(tmp_path, command, name):
    cifar10(tmp_path)
    path, trace = tmp_path / "cifar-10-batches-py" / name, tmp_path / "trace"
    path.write_bytes(pickle.dumps({b"data": Touch(trace), b"labels": [0]}))
    code, _, err = command("inspect", "--dataset", "cifar10", "--root", tmp_path)
    assert code == 2 and f"cannot read {path}: it asks for posix.mkdir" in err and len(err.splitlines()) == 1
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "without the guard it would have run"


@pytest.mark.parametrize("call", [("builtins", "eval"), ("numpy", "load"), ("os", "system"), ("numpy", "__dict__")])
def test_no_other_name_is_admitted(tmp_path, call):
    cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.write_bytes(b"\x80\x02c%s\n%s\n." % tuple(word.encode() for word in call))
    with pytest.raises(BadInput, match=f"it asks for {call[0]}.{call[1]}"):
        read_dataset("cifar10", tmp_path, ["test"])


GOOD = {"labels": [0, 1], "data": np.zeros((2, 3072), np.uint8)}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (GOOD | {"labels": [0, 10]}, "test_batch row 1: label 10 is out of range, there are 10 classes"),
        (GOOD | {"labels": [0, -1]}, "row 1: label -1 is out of range"),
        (GOOD | {"labels": [0]}, r"data must be uint8 \[N, 3072\], with N labels"),
        (GOOD | {"data": np.zeros((2, 3072), np.float32)}, "data must be uint8"),
        (GOOD | {"data": np.zeros((2, 1024), np.uint8)}, "data must be uint8"),
        ({}, "data must be uint8"),
    ],
)
def test_a_batch_of_another_shape(tmp_path, contents, message):
    cifar10(tmp_path)
    write_batch(tmp_path / "cifar-10-batches-py/test_batch", contents)
    with pytest.raises(BadInput, match=message):
        read_dataset("cifar10", tmp_path, ["test"])


def test_damaged_files_are_named(tmp_path):
    cifar10(tmp_path)
    home = tmp_path / "cifar-10-batches-py"
    (home / "test_batch").write_bytes((home / "test_batch").read_bytes()[:500])
    with pytest.raises(BadInput, match="cannot read .*test_batch: "):
        read_dataset("cifar10", tmp_path, ["test"])
    (home / "data_batch_4").unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(BadInput, match="no data_batch_4 in .*; unpack .*cifar-10-python.tar.gz; expected"):
        read_dataset("cifar10", tmp_path)
    stl10(tmp_path)
    with open(tmp_path / "stl10_binary/test_X.bin", "ab") as file:
        file.write(b"0")
    with pytest.raises(BadInput, match="test_X.bin is not the size of the 1 images"):
        read_dataset("stl10", tmp_path, ["test"])
    np.array([4, 0], np.uint8).tofile(tmp_path / "stl10_binary/train_y.bin")
    with pytest.raises(BadInput, match="row 0: label 4 is out of range 1 to 3"):
        read_dataset("stl10", tmp_path, ["train"])
