"""The smallest inputs of what the slow trust harnesses found."""

import os

import pytest
import torch
import trust
from layouts import LAYOUTS
from stores import write_store

import featcache
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.errors import BadInput
from featcache.probes.grids.grid import parse_grid


def test_a_folder_with_two_labels_is_no_list_of_places(tmp_path):
    root, _ = LAYOUTS["places205"](tmp_path)
    path = root / "trainvalsplit_places205/train_places205.csv"
    path.write_text(path.read_text().replace(",1", ",7"))
    with pytest.raises(BadInput, match=r"label 1, others of y/yard have 7"):
        read_dataset("places205", root)


def test_a_split_with_a_percent_sign_is_read_from_the_index_of_an_hdf5_store(tmp_path):
    import h5py

    images = trust.write_images(tmp_path)
    images.write_text(images.read_text().replace(",train,", ",50%b,"))
    trust.quietly(lambda: trust.write_store(images, tmp_path / "s.hdf5"))
    rows = featcache.open_store(tmp_path / "s.hdf5")["50%b"]["pooled"][:]
    with h5py.File(tmp_path / "s.hdf5/index.h5") as file:
        (name,) = [name for name in file["50%b"] if name.endswith("pooled")]
        assert (file["50%b"][name][:] == rows).all()


@pytest.mark.parametrize("suffix", ["zarr", "hdf5"])
def test_digests_of_a_store_without_a_marker_are_one_line(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_store(path)
    split = featcache.open_store(path)["train"]
    (path / "commits/train/000001.json").unlink()
    with pytest.raises(BadInput, match="is gone: the shard is not committed"):
        split.digests  # noqa: B018


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_plain_numbers_are_named(tmp_path, change):
    state = trust.network().state_dict()
    torch.save(state | {"0.weight": change(state["0.weight"])}, tmp_path / "net.pth")
    with pytest.raises(BadInput, match="0.weight"):
        load_backbone(tmp_path / "net.pth", arch="trust:network")


def test_a_path_that_is_not_utf8_is_no_damage(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.pth")
    torch.save(trust.network().state_dict(), tmp_path / "net.pth")
    os.rename(tmp_path / "net.pth", path)
    with pytest.raises(BadInput, match="its path is not UTF-8; rename it"):
        load_backbone(path, arch="trust:network")


def test_a_grid_with_text_that_cannot_be_written_is_one_line():
    with pytest.raises(BadInput, match="which is not UTF-8"):
        parse_grid({"probes": [trust.GRID["probes"][0] | {"name": "x\ud800"}]})
