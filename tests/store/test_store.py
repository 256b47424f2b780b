"""The store: standard Zarr, numpy's indexing, and no shard that is not whole."""

import hashlib
import json
import shutil
import zlib

import numpy as np
import pytest
import zarr
from folders import unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ROWS, index, write_store

from featcache.errors import BadInput
from featcache.store.manifest import identity_hash
from featcache.store.reader import open_store
from featcache.store.sealed import seal, unseal
from featcache.store.verify import verify


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_zarr_reads_it(tmp_path, dtype):
    features = write_store(tmp_path / "x.zarr", dtype)
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="r")["train"]
    for name, rows in features.items():
        array = group[name.replace(":", ".")]
        assert array.shards is not None and np.isnan(array.fill_value)
        assert array.dtype == dtype and np.array_equal(array[:], rows)
    ids = [bytes(row).rstrip(b"\0").decode() for row in group["ids"][:]]
    assert ids == [f"picture-{n}é" for n in range(ROWS)] == open_store(tmp_path / "x.zarr")["train"].ids
    assert group["labels"].dtype == np.int8


def test_plain_zarr_finds_a_flipped_byte(tmp_path):
    write_store(tmp_path / "x.zarr")
    file = tmp_path / "x.zarr/train/layer4.pooled/c/0/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(tmp_path / "x.zarr/train/layer4.pooled"), mode="r")[:]


def test_small_arrays_come_back(tmp_path):
    write_store(tmp_path / "x.zarr")
    train = open_store(tmp_path / "x.zarr")["train"]
    assert train.labels.tolist() == [[1, 0, -1]] * ROWS
    assert train.sizes[3].tolist() == [13, 20]
    assert [len(boxes) for boxes, _, _ in train.boxes] == [n % 3 for n in range(ROWS)]
    assert train.boxes[5][0].tolist() == [[5.0] * 4] * 2
    write_store(tmp_path / "y.zarr", single=True)
    assert open_store(tmp_path / "y.zarr")["train"].labels.tolist() == [n % 3 for n in range(ROWS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "x.zarr"
    features = write_store(path)
    return open_store(path)["train"]["last:spatial"], features["layer4:spatial"]


@settings(max_examples=150, deadline=None)
@given(key=index)
def test_indexing_is_numpys(model, key):
    stored, rows = model
    expected = rows[key]
    got = stored[key]
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert np.array_equal(got, expected)


def test_out_of_range_and_conversion(model):
    stored, rows = model
    for key in (ROWS, -ROWS - 1, np.array([0, ROWS])):
        with pytest.raises(IndexError):
            stored[key]
    assert np.array_equal(np.asarray(stored), rows)
    assert np.asarray(stored, dtype=np.float64).dtype == np.float64
    assert stored.shape == rows.shape and len(stored) == ROWS and stored.nbytes == rows.nbytes


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 40),
    chunk_rows=st.sampled_from([1, 2, 8]),
    shard_bytes=st.integers(1, 3000),
    width=st.integers(1, 5),
)
def test_any_geometry_round_trips(tmp_path_factory, rows, chunk_rows, shard_bytes, width):
    path = tmp_path_factory.mktemp("g") / "x.zarr"
    features = write_store(path, rows=rows, chunk_rows=chunk_rows, shard_bytes=shard_bytes, row=(width, 1, 2))
    for name, expected in features.items():
        assert np.array_equal(open_store(path)["train"][name][:], expected)
        assert np.array_equal(zarr.open_array(str(path / "train" / name.replace(":", ".")), mode="r")[:], expected)


def test_missing_shards_raise_and_are_named(tmp_path):
    write_store(tmp_path / "x.zarr")
    (tmp_path / "x.zarr/commits/train/000001.json").unlink()
    with pytest.raises(
        BadInput, match=r"incomplete: split train lacks 1 of 3 shards, the first is shard 1 \(rows 8 to 15\)"
    ):
        open_store(tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "train/layer4.pooled/c/0/0").unlink(), "cannot be read"),
        (lambda p: (p / "train/layer4.pooled/c/0/0").write_bytes(b"12345"), "5 bytes, its marker says"),
        (lambda p: (p / "commits/train/000000.json").write_text("{"), "damaged marker .*000000.json"),
        (
            lambda p: shutil.copy(p / "commits/train/000001.json", p / "commits/train/000000.json"),
            "marker .*000000.json is not that of its shard",
        ),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged manifest"),
        (lambda p: (p / "manifest.json").unlink(), "has lost its manifest.json"),
        (lambda p: [shutil.rmtree(p / "commits"), (p / "manifest.json").unlink()], "not a featcache store"),
        (lambda p: shutil.rmtree(p), "store not found"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    path = tmp_path / "x.zarr"
    write_store(path)
    damage(path)
    with pytest.raises(BadInput, match=message):
        open_store(path)["train"]["last:pooled"][:]


def test_a_tampered_or_future_manifest_is_refused(tmp_path):
    write_store(tmp_path / "x.zarr")
    file = tmp_path / "x.zarr/manifest.json"
    content = unseal(file.read_bytes())
    file.write_bytes(seal(content | {"version": 2}))
    with pytest.raises(BadInput, match="format version 2"):
        open_store(tmp_path / "x.zarr")
    content["identity"]["arch"] = "other"
    file.write_bytes(seal(content))
    with pytest.raises(BadInput, match="does not hash to its id"):
        open_store(tmp_path / "x.zarr")
    file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="damaged manifest .*featcache verify"):
        open_store(tmp_path / "x.zarr")


def test_unknown_names_suggest(tmp_path):
    write_store(tmp_path / "x.zarr")
    store = open_store(tmp_path / "x.zarr")
    with pytest.raises(BadInput, match="no split 'trian'; did you mean 'train'"):
        store["trian"]
    with pytest.raises(
        BadInput,
        match=r"no feature 'layer3:pooled'; did you mean 'layer4:pooled'\? \(it holds layer4:pooled, layer4:spatial\)",
    ):
        store["train"]["layer3:pooled"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=3), c, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), json_values, min_size=1, max_size=5), st.randoms())
def test_identity_ignores_order_and_sees_every_field(identity, random):
    keys = list(identity)
    random.shuffle(keys)
    assert identity_hash({k: identity[k] for k in keys}) == identity_hash(identity)
    key = random.choice(keys)
    assert identity_hash(identity | {key: ["changed", identity[key]]}) != identity_hash(identity)


def test_the_format_is_as_documented(tmp_path):
    """A reader of docs/store-format.md: no zarr, nothing of ours, only the standard library and numpy."""
    features = write_store(tmp_path / "x.zarr")
    manifest = json.loads((tmp_path / "x.zarr/manifest.json").read_text())
    canonical = json.dumps(manifest["identity"], sort_keys=True).encode()
    assert hashlib.sha256(canonical).hexdigest() == manifest["id"]
    rows, shard_rows = manifest["splits"]["train"]["rows"], manifest["splits"]["train"]["shard_rows"]
    for name, spec in manifest["features"].items():
        folder = tmp_path / "x.zarr" / "train" / name.replace(":", ".") / "c"
        row_bytes = int(np.prod(spec["shape"])) * 2
        for row in range(rows):
            shard, local = divmod(row, shard_rows)
            data = folder.joinpath(str(shard), *["0"] * len(spec["shape"])).read_bytes()
            chunk, within = divmod(local, spec["chunk_rows"])
            start = chunk * (spec["chunk_rows"] * row_bytes + 4) + within * row_bytes
            values = np.frombuffer(data, "<f2", int(np.prod(spec["shape"])), start).reshape(spec["shape"])
            assert np.array_equal(values, features[name][row])
            marker = json.loads((tmp_path / f"x.zarr/commits/train/{shard:06d}.json").read_text())
            assert marker["files"][name]["bytes"] == len(data) and marker["files"][name]["offset"] == 0
            assert marker["files"][name]["crc32"] == zlib.crc32(data)
            first, end = marker["rows"]
            assert first <= row < end
            lines = "".join(f"picture-{n}é\n" for n in range(first, end))
            assert marker["ids_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_stores_of_version_1_stay_readable(tmp_path):
    """Written when the format was fixed; what is written today has the same bytes, but for the libraries' own files."""
    unpack("store_v1", tmp_path)
    for suffix in ("zarr", "hdf5"):
        path = tmp_path / f"v1.{suffix}"
        features = write_store(tmp_path / f"today.{suffix}", known=False)
        assert verify(path) == []
        for name, rows in features.items():
            assert np.array_equal(open_store(path)["train"][name][:], rows)
        assert open_store(path)["train"].ids == open_store(tmp_path / f"today.{suffix}")["train"].ids
    for file in tmp_path.glob("v1.zarr/*/**/*"):
        if file.is_file() and file.name != "zarr.json":
            assert file.read_bytes() == (tmp_path / "today.zarr" / file.relative_to(tmp_path / "v1.zarr")).read_bytes()
