"""Verification finds any damage; repair drops just that; the same writing again makes the store whole."""

import json
import os
import shutil

import pytest
from folders import tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

import featcache
from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.verify import verify

KINDS = {"zarr": "x.zarr", "hdf5": "x.hdf5", "zstd": "z.zarr", "blosc": "b.zarr"}


def write(path, kind):
    return write_store(path, compression=kind if kind in ("zstd", "blosc") else None)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """(kind, path of an undamaged store, its hash)."""
    path = tmp_path_factory.mktemp("whole") / KINDS[request.param]
    write(path, request.param)
    return request.param, path, tree_hash(path)


def data_files(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_whole_store_is_whole(whole, command):
    _, path, _ = whole
    assert verify(path) == []
    code, out, _ = command("verify", path)
    assert code == 0 and "is whole" in out


@pytest.mark.process
@settings(max_examples=60, deadline=None)
@given(choice=st.data())
def test_any_flipped_bit_is_found_and_mended(whole, tmp_path_factory, choice):
    kind, path, before = whole
    copy = tmp_path_factory.mktemp("flip") / path.name
    shutil.copytree(path, copy)
    file = choice.draw(st.sampled_from(data_files(copy)))
    data = bytearray(file.read_bytes())
    at = choice.draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << choice.draw(st.integers(0, 7))
    file.write_bytes(data)
    name = file.relative_to(copy).as_posix()
    findings = verify(copy)
    assert findings and name in {finding.where for finding in findings}, (name, at)
    assert verify(copy, repair=True)
    assert not file.exists()
    write(copy, kind)
    assert tree_hash(copy) == before
    shutil.rmtree(copy)


@pytest.mark.process
def test_every_byte_of_the_small_files_counts(whole, tmp_path):
    """Not a sample: each byte of the manifest and of a marker."""
    _, path, _ = whole
    shutil.copytree(path, tmp_path / path.name)
    for name in ("manifest.json", "commits/train/000001.json"):
        file = tmp_path / path.name / name
        data = file.read_bytes()
        for at in range(len(data)):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(BadInput, match="damaged"):
                featcache.open_store(tmp_path / path.name)["train"]["pooled"][10]
        file.write_bytes(data)
    assert verify(tmp_path / path.name) == []


def shard_files(path):
    pattern = "train/layer4.spatial/c/*/0/0/0" if path.suffix == ".zarr" else "train/layer4.spatial/*.h5"
    return sorted(path.glob(pattern))


def test_rows_are_named(whole, tmp_path):
    kind, path, _ = whole
    shutil.copytree(path, tmp_path / path.name)
    file = shard_files(tmp_path / path.name)[1]
    data = bytearray(file.read_bytes())
    # The second chunk of the second shard: rows 12 to 15.
    if kind in ("zstd", "blosc"):
        pytest.skip("where a chunk lies in a compressed shard is not fixed")
    marker = json.loads((path / "commits/train/000001.json").read_text())
    at = marker["files"]["layer4:spatial"]["offset"] + 4 * 24 + (4 if kind == "zarr" else 0) + 7
    data[at] ^= 16
    file.write_bytes(data)
    (finding,) = verify(tmp_path / path.name)
    assert finding.where == file.relative_to(tmp_path / path.name).as_posix()
    assert "shard 1 (rows 8 to 15)" in finding.what and "damaged rows 12 to 15" in finding.what
    assert "layer4:spatial" in finding.what


@pytest.mark.parametrize(
    ("harm", "count"),
    [
        (lambda path, files: os.truncate(files[0], files[0].stat().st_size - 1), 1),
        (lambda path, files: files[0].unlink(), 1),
        (lambda path, files: swap(files[0], files[1]), 2),
        (lambda path, files: swap(path / "commits/train/000000.json", path / "commits/train/000001.json"), 2),
        (lambda path, files: (path / "commits/train/000002.json").unlink(), 1),
        (lambda path, files: (path / "manifest.json").unlink(), 1),
        (lambda path, files: (path / "manifest.json").write_bytes(b""), 1),
    ],
)
def test_lost_cut_and_swapped_files(whole, tmp_path, command, harm, count):
    kind, path, before = whole
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    if kind in ("zstd", "blosc") and count == 2:
        pytest.skip("compressed shards differ in length: swapping them is the case of a wrong length")
    harm(copy, shard_files(copy))
    code, out, err = command("verify", copy)
    assert code == 1 and len(out.splitlines()) == count and "--repair" in err
    assert command("verify", copy, "--repair")[0] == 1
    write(copy, kind)
    assert tree_hash(copy) == before


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def test_a_shard_of_another_store_is_refused(tmp_path):
    write_store(tmp_path / "a.zarr")
    write_store(tmp_path / "b.zarr", dtype="float16", row=(3, 2, 1))
    marker = "commits/train/000000.json"
    content = (tmp_path / "b.zarr" / marker).read_bytes()
    assert content != (tmp_path / "a.zarr" / marker).read_bytes()
    (tmp_path / "a.zarr" / marker).write_bytes(content)
    assert [f.where for f in verify(tmp_path / "a.zarr")]


def test_what_is_not_a_store(tmp_path, command):
    code, _, err = command("verify", tmp_path / "none")
    assert code == 2 and "store not found" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/download.partial").write_text("x")
    code, _, err = command("verify", tmp_path / "other")
    assert code == 2 and "not a featcache store" in err
    with pytest.raises(BadInput, match="is there already and is not a featcache store"):
        write_store(tmp_path / "other")
    assert (tmp_path / "other/download.partial").exists(), "what is not ours is not swept up"


def test_equal_shards_agree_and_unequal_ones_are_an_error(tmp_path):
    """Two writers that come with the same shard."""
    from featcache.store.manifest import read_manifest
    from featcache.store.shard import Shard
    from featcache.store.writer import put_shard

    features = write_store(tmp_path / "x.zarr")
    before = tree_hash(tmp_path / "x.zarr")
    folder, manifest = open_folder(tmp_path / "x.zarr"), read_manifest(tmp_path / "x.zarr")
    ids = [f"picture-{n}é" for n in range(8)]
    shard = {name: rows[:8] for name, rows in features.items()}
    put_shard(Shard(folder, manifest, "train", 0), ids, shard)
    shard["layer4:pooled"] = shard["layer4:pooled"] + 1
    with pytest.raises(BadInput, match="committed with other values"):
        put_shard(Shard(folder, manifest, "train", 0), ids, shard)
    assert tree_hash(tmp_path / "x.zarr") == before
