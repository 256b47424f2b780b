"""A store that has grown: read as one, damaged and mended part by part, and whole at every moment while it grows."""

import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import zarr
from folders import SUPPORT, tree_hash
from stores import ROWS, grow_store, write_store

import featcache
from featcache.errors import BadInput
from featcache.store.additions import find_additions
from featcache.store.folder import open_folder

SUFFIXES = ["zarr", "hdf5"]


@pytest.fixture(params=SUFFIXES)
def grown(request, tmp_path):
    """(path of a store that has grown, its features before)."""
    path = tmp_path / f"x.{request.param}"
    features = write_store(path)
    grow_store(path)
    return path, features


def test_all_is_read_as_one(grown, tmp_path):
    path, features = grown
    added = np.random.default_rng(1).normal(size=(ROWS, 5)).astype(np.float16)
    train = featcache.open_store(path)["train"]
    for name, rows in {**features, "layer3:pooled": added}.items():
        assert np.array_equal(train[name][:], rows) and np.array_equal(train[name][[3, 22, 0]], rows[[3, 22, 0]])
        for numbers, batch in train[name].batches(5, shuffle=True):
            assert np.array_equal(batch, rows[numbers])
    if path.suffix == ".zarr":
        plain = {name: array[:] for name, array in zarr.open(path)["train"].arrays()}
        assert np.array_equal(zarr.open(path)["train/layer3.pooled"][:], added)
    else:
        with h5py.File(path / "index.h5") as file:
            plain = {name: file["train"][name][()] for name in file["train"]}
    assert np.array_equal(plain["layer3.pooled"], added)
    assert np.array_equal(plain["layer4.spatial"], features["layer4:spatial"])
    assert featcache.verify(path) == []
    other = featcache.convert(path, out=tmp_path / f"y{'.hdf5' if path.suffix == '.zarr' else '.zarr'}")
    store, copied = featcache.open_store(path), featcache.open_store(other)
    assert copied.id == store.id and len(copied.parts) == 1
    assert np.array_equal(copied["train"].digests, store["train"].digests)
    for name in store.manifest.features:
        assert np.array_equal(copied["train"][name][:], store["train"][name][:])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_growing_leaves_what_was_there_as_it_was(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_store(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    id, opened = featcache.open_store(path).id, featcache.open_store(path)["train"]
    grow_store(path)
    changed = {file.name for file, data in before.items() if file.read_bytes() != data}
    assert changed == {"zarr.json" if suffix == "zarr" else "index.h5"}
    # A store that was opened before goes on.
    assert len(opened.ids) == ROWS and len(opened["spatial"][:]) == ROWS
    store = featcache.open_store(path)
    assert store.ids == (id, store.id) and store.known_as(id).id == id
    assert store.known_as(id)["train"]["layer3:pooled"].shape == (ROWS, 5)
    again = tree_hash(path)
    grow_store(path)
    assert tree_hash(path) == again


def test_an_addition_of_another_store_is_refused(grown, tmp_path):
    path, _ = grown
    (addition,) = find_additions(open_folder(path))
    other = tmp_path / f"other{path.suffix}"
    write_store(other, rows=9)
    shutil.copy(path / addition.file_name, other)
    with pytest.raises(BadInput, match="its splits have other rows than the store's"):
        featcache.open_store(other)
    assert featcache.verify(other)


# Dies, or gets an error, at the Nth thing that is done to the file system below a store that grows.
FAULTS = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import shutil
from pathlib import Path
import numpy as np
from faults import NOT_REACHED, in_child
from folders import tree_hash
from stores import grow_store, write_store
from featcache.errors import BadInput
from featcache.store.reader import open_store
from featcache.store.verify import verify

root, suffix, mode = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
small = root / f"small.{suffix}"
before = write_store(small, rows=9)

whole = root / f"whole.{suffix}"
shutil.copytree(small, whole)
assert in_child(grow_store, whole, 0, mode) == 0
expected, n = tree_hash(whole), 0
while True:
    n += 1
    path = root / f"{n}.{suffix}"
    shutil.copytree(small, path)
    code = in_child(grow_store, path, n, mode, (BadInput,))
    if code == NOT_REACHED:
        break
    assert code in ((-signal.SIGKILL,) if mode == "kill" else (5, 0)), (n, code)
    store = open_store(path)
    for name, rows in before.items():
        assert np.array_equal(store["train"][name][:], rows), n
    assert len(store.parts) == 1 or len(store["train"]["layer3:pooled"][:]) == 9
    assert verify(path) == [], n
    assert in_child(grow_store, path, 0, mode) == 0
    assert tree_hash(path) == expected, n
    shutil.rmtree(path)
print(n)
"""


@pytest.mark.process
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("mode", ["error", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_fault_at_every_file_operation(tmp_path, suffix, mode):
    words = [sys.executable, "-c", FAULTS, str(SUPPORT), str(tmp_path), suffix, mode]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
