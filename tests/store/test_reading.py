"""Reading a store of any kind: numpy's indexing, tensors, batches, workers, handles, and plain readers."""

import hashlib
import json
import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ROWS, Rows, index, write_store

import featcache
from featcache.errors import BadInput

KINDS = {
    "zarr": ("x.zarr", "float16", None),
    "zstd": ("x.zarr", "float32", "zstd"),
    "blosc": ("x.zarr", "float16", "blosc"),
    "hdf5": ("x.hdf5", "float16", None),
    "bfloat16": ("x.zarr", "bfloat16", None),
    "bfloat16 in hdf5": ("x.hdf5", "bfloat16", None),
}


def as_tensor(rows, dtype):
    return torch.from_numpy(rows).view(getattr(torch, dtype))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(path, dtype, stored rows of layer4:spatial)."""
    name, dtype, compression = KINDS[request.param]
    path = tmp_path_factory.mktemp("kind") / name
    return path, dtype, write_store(path, dtype, compression=compression)["layer4:spatial"]


@pytest.fixture(scope="module")
def array(kind):
    """(the FeatureArray, the same rows as a numpy array)."""
    path, dtype, rows = kind
    expected = as_tensor(rows, dtype)
    return featcache.open_store(path)["train"]["spatial"], (
        expected.float() if dtype == "bfloat16" else expected
    ).numpy()


@settings(max_examples=60, deadline=None)
@given(key=index)
def test_indexing_is_numpys(array, key):
    stored, rows = array
    expected, got = rows[key], stored[key]
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert np.array_equal(got, expected)


ODD_KEYS = [
    (), None, ..., True, (..., 0), (None, 0), ([0, 1], [0, 1]), (3, slice(None), [0, 1]), ([4, 4, -1], slice(1), 0),
    ([0, 1], ..., 1), (5, ..., 0), (slice(2, 9, 3), [0, 2]), (slice(None, None, -1), None), [], np.ones((ROWS, 3), bool),
    (np.arange(ROWS) > 20, 1), (np.array([[0], [22]]), np.array([0, 2])), np.int64(3), (2, 1, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("key", ODD_KEYS, ids=repr)
def test_odd_indices_are_numpys(array, key):
    stored, rows = array
    assert stored[key].shape == rows[key].shape and np.array_equal(stored[key], rows[key])


def test_indices_that_do_not_fit(array):
    for key in (([0, 1], [0, 1, 2]), (0, 0, 0, 0, 0), 1.5, np.ones(ROWS + 1, bool)):
        with pytest.raises(IndexError):
            array[1][key]
        with pytest.raises(IndexError):
            array[0][key]


def test_a_relative_path_outlives_chdir(kind, array, monkeypatch, tmp_path):
    monkeypatch.chdir(kind[0].parent)
    relative = featcache.open_store(kind[0].name)["train"]["spatial"]
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(relative[:], array[1])


def test_out_of_range(array):
    for key in (ROWS, -ROWS - 1, np.array([0, ROWS])):
        with pytest.raises(IndexError):
            array[0][key]


def test_to_torch(kind, array, monkeypatch):
    path, dtype, rows = kind
    # Pieces of one chunk, so that there are several.
    monkeypatch.setattr("featcache.store.feature_array.PIECE_BYTES", 1)
    tensor = array[0].to_torch()
    assert tensor.dtype == getattr(torch, dtype) and torch.equal(tensor, as_tensor(rows, dtype))
    assert torch.equal(array[0].to_torch("cpu", torch.float64), as_tensor(rows, dtype).double())


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 30), memory=st.integers(1, 2000), seed=st.integers(0, 9), shuffle=st.booleans())
def test_every_row_once_an_epoch(array, size, memory, seed, shuffle):
    stored, rows = array
    batches = list(stored.batches(size, shuffle=shuffle, seed=seed, memory=memory))
    numbers = np.concatenate([n for n, _ in batches])
    assert sorted(numbers) == list(range(ROWS)) and (shuffle or list(numbers) == list(range(ROWS)))
    assert np.array_equal(np.concatenate([v for _, v in batches]), rows[numbers])
    assert all(len(n) == size for n, _ in batches[:-1]) and batches[0][1].dtype == rows.dtype
    same = np.concatenate([n for n, _ in stored.batches(size, shuffle=shuffle, seed=seed, memory=memory)])
    assert np.array_equal(numbers, same)


@pytest.mark.parametrize("name", ["pooled", "spatial"])
def test_picking_from_mapped_shards_is_picking_from_a_buffer(kind, name, monkeypatch):
    def batches():
        stored = featcache.open_store(kind[0])["train"][name]
        return [
            (numbers.copy(), rows)
            for epoch in (0, 1)
            for numbers, rows in stored.batches(4, shuffle=True, seed=(3, epoch))
        ]

    mapped = batches()
    monkeypatch.setattr("featcache.store.sources.MAPPED_SHARDS", 1)
    for (numbers, rows), (numbers_of_buffer, rows_of_buffer) in zip(mapped, batches(), strict=True):
        assert np.array_equal(numbers, numbers_of_buffer) and rows.dtype == rows_of_buffer.dtype
        assert rows.tobytes() == rows_of_buffer.tobytes()


def test_rows_picked_from_mapped_shards_are_ones_own(kind):
    stored = featcache.open_store(kind[0])["train"]["spatial"]
    numbers, rows = next(stored.batches(4, shuffle=True))
    expected = rows.copy()
    stored.release()
    assert np.array_equal(rows, expected) and np.array_equal(stored[numbers], expected)
    rows[:] = 0
    assert np.array_equal(stored[numbers], expected)


def test_orders_differ_and_mix(array):
    stored, _ = array
    first, second = ([n for n, _ in stored.batches(4, shuffle=True, seed=(0, epoch))] for epoch in (0, 1))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert len({int(n) // 8 for n in first[0]} | {int(n) // 8 for n in first[1]}) > 1, "rows of several shards"
    with pytest.raises(ValueError, match="not positive"):
        next(stored.batches(0))


@pytest.mark.process
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(array, start):
    stored, rows = array
    stored[:]
    loader = torch.utils.data.DataLoader(Rows(stored), batch_size=4, num_workers=2, multiprocessing_context=start)
    assert np.array_equal(torch.cat(list(loader)).numpy(), rows)
    assert np.array_equal(pickle.loads(pickle.dumps(stored))[:], rows)


@pytest.mark.process
def test_many_readers_at_once(kind, array):
    code = "import sys, hashlib, featcache; a = featcache.open_store(sys.argv[1])['train']['spatial']; "
    code += "print(hashlib.sha256(a[list(range(len(a)))].tobytes()).hexdigest())"
    readers = [
        subprocess.Popen([sys.executable, "-c", code, kind[0]], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = {reader.communicate()[0].strip() for reader in readers}
    assert said == {hashlib.sha256(array[1].tobytes()).hexdigest()}


def test_no_handle_leaks(kind):
    def read():
        train = featcache.open_store(kind[0])["train"]
        return train["spatial"][:].sum() + train["spatial"][[1, 20]].sum() + len(train.ids) + len(train.boxes)

    read()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.process
@pytest.mark.parametrize("suffix", ["zarr", "hdf5"])
def test_more_shards_than_handles(tmp_path, suffix):
    features = write_store(tmp_path / f"x.{suffix}", rows=300, chunk_rows=1, shard_bytes=1)["layer4:pooled"]
    code = "import resource, sys, featcache; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); "
    code += "t = featcache.open_store(sys.argv[1])['train']; a, b = t['pooled'], t['spatial']; a[:], b[:]; "
    code += "b._source.release(); print(float(a[:].astype('f8').sum()))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / f"x.{suffix}"], capture_output=True, text=True)
    assert float(done.stdout) == features.astype("f8").sum(), done.stderr


def test_plain_readers(kind, tmp_path, monkeypatch):
    path, dtype, rows = kind
    monkeypatch.chdir(tmp_path)
    if path.suffix == ".hdf5":
        with h5py.File(path / "index.h5", "r") as file:
            assert np.array_equal(file["train/layer4.spatial"][:], rows)
            assert file["train/layer4.spatial"].attrs["dtype"] == dtype
        opened = xarray.open_dataset(path / "index.h5", engine="h5netcdf", group="train", mask_and_scale=False)
    else:
        group = zarr.open_group(str(path), mode="r")["train"]
        assert np.array_equal(group["layer4.spatial"][:], rows) and group["layer4.spatial"].attrs["dtype"] == dtype
        opened = xarray.open_zarr(path, group="train", chunks=None, mask_and_scale=False)
    with opened:
        assert np.array_equal(opened["layer4.spatial"].values, rows)
        assert opened["layer4.spatial"].dims == ("row", *(f"layer4.spatial.{axis}" for axis in ("channel", "y", "x")))
        assert opened["labels"].values.tolist() == [[1, 0, -1]] * ROWS


def test_hdf5_is_as_documented(tmp_path):
    """Nothing but the standard library and numpy."""
    features = write_store(tmp_path / "x.hdf5")
    manifest = json.loads((tmp_path / "x.hdf5/manifest.json").read_text())
    rows, shard_rows = manifest["splits"]["train"]["rows"], manifest["splits"]["train"]["shard_rows"]
    for name, spec in manifest["features"].items():
        parts = []
        for shard in range(-(-rows // shard_rows)):
            marker = json.loads((tmp_path / f"x.hdf5/commits/train/{shard:06d}.json").read_text())
            file = tmp_path / "x.hdf5/train" / name.replace(":", ".") / f"{shard:06d}.h5"
            shape = (marker["rows"][1] - marker["rows"][0], *spec["shape"])
            parts.append(np.memmap(file, "<f2", "r", marker["files"][name]["offset"], shape))
        assert np.array_equal(np.concatenate(parts), features[name])


@pytest.mark.parametrize("compression", ["zstd", "blosc"])
def test_a_hole_in_a_compressed_store_is_no_nan(tmp_path, compression):
    write_store(tmp_path / "x.zarr", compression=compression)
    shard = tmp_path / "x.zarr/train/layer4.spatial/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 4
    shard.write_bytes(data)
    array = featcache.open_store(tmp_path / "x.zarr")["train"]["spatial"]
    assert np.isfinite(array[:8]).all()
    with pytest.raises(BadInput, match="damaged rows .*verify"):
        array[8:12]
    shard.unlink()
    with pytest.raises(BadInput, match="it is missing"):
        featcache.open_store(tmp_path / "x.zarr")["train"]["spatial"][[0, 9]]
