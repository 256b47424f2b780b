"""Conversion between formats, compressions and places; inspection."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from extracting import options
from folders import tree_hash
from stores import ROWS, write_store

import featcache
from featcache.errors import BadInput
from featcache.store.verify import verify


@pytest.mark.process
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("compression", [None, "zstd", "blosc"])
def test_there_and_back_again(tmp_path, dtype, compression):
    write_store(tmp_path / "x.zarr", dtype, compression=compression)
    hdf5 = featcache.convert(tmp_path / "x.zarr", "hdf5")
    assert hdf5 == str(tmp_path / "x.hdf5") and verify(hdf5) == []
    write_store(tmp_path / "direct.hdf5", dtype)
    assert tree_hash(hdf5) == tree_hash(tmp_path / "direct.hdf5")
    back = featcache.convert(hdf5, out=tmp_path / "back.zarr", compression=compression)
    assert tree_hash(back) == tree_hash(tmp_path / "x.zarr")
    assert featcache.open_store(back).id == featcache.open_store(hdf5).id


def test_damage_in_the_source_is_found(tmp_path, command):
    write_store(tmp_path / "x.zarr")
    file = tmp_path / "x.zarr/train/layer4.pooled/c/1/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    code, _, err = command("convert", tmp_path / "x.zarr", "--to", "hdf5")
    assert code == 2 and "damaged rows 8 to 11" in err and "verify" in err
    with pytest.raises(BadInput, match="incomplete"):
        featcache.open_store(tmp_path / "x.hdf5")


@pytest.mark.process
def test_convert_goes_on_after_a_kill(tmp_path):
    write_store(tmp_path / "x.zarr", rows=400, shard_bytes=30)
    featcache.convert(tmp_path / "x.zarr", "hdf5", out=tmp_path / "whole.hdf5")
    words = [sys.executable, "-m", "featcache", "convert", str(tmp_path / "x.zarr"), "--to", "hdf5"]
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        before = len(list(tmp_path.glob("x.hdf5/commits/train/*.json")))
        while len(list(tmp_path.glob("x.hdf5/commits/train/*.json"))) <= before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, capture_output=True)
    assert tree_hash(tmp_path / "x.hdf5") == tree_hash(tmp_path / "whole.hdf5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to convert to"),
        (["--to", "zarr"], "is the store itself"),
        (["--to", "hdf5", "--compression", "zstd"], "is not compressed"),
        (["--to", "hdf5", "--out", "memory://x.hdf5"], "a store at a URL is Zarr"),
        (["--out", "other.zarr"], "is another store"),
        (["--out", "taken"], "is not a featcache store"),
        (["--to", "netcdf"], "netcdf"),
    ],
)
def test_wrong_conversions(tmp_path, command, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "x.zarr")
    write_store(tmp_path / "other.zarr", dtype="float32")
    (tmp_path / "other.zarr/manifest.json").write_bytes(another_id(tmp_path / "other.zarr/manifest.json"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("x")
    code, _, err = command("convert", "x.zarr", *words)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "x.hdf5").exists() and list((tmp_path / "taken").iterdir())


def another_id(file):
    from featcache.store.manifest import identity_hash
    from featcache.store.sealed import seal, unseal

    content = unseal(file.read_bytes())
    content["identity"]["arch"] = "other"
    return seal(content | {"id": identity_hash(content["identity"])})


def test_statistics_are_numpys(tmp_path):
    features = write_store(tmp_path / "x.zarr", "float32")
    statistics = featcache.inspect(tmp_path / "x.zarr")["train"]
    for name, rows in features.items():
        s = statistics[name]
        np.testing.assert_allclose([s.mean, s.std, s.peak], [rows.mean(), rows.std(), np.abs(rows).max()], rtol=1e-6)
        assert s.zeros == 0 and s.not_finite == 0


def test_inspect_counts_what_is_not_finite(tmp_path, monkeypatch):
    from featcache.store import feature_array
    from featcache.store.inspect import statistics

    class Rows:
        def pieces(self):
            yield 0, np.array([[0, np.nan, 4], [0, -np.inf, 0]], np.float32)
            yield 2, np.array([[-8, 0, 4]], np.float32)

    s = statistics(Rows())
    assert (s.not_finite, s.peak, s.mean) == (2, 8, 0) and s.zeros == pytest.approx(4 / 9)
    assert s.std == pytest.approx(np.std([0, 4, 0, 0, -8, 0, 4]))
    # Pieces of any size give the same.
    features = write_store(tmp_path / "x.hdf5", "float32")["layer4:pooled"]
    monkeypatch.setattr(feature_array, "PIECE_BYTES", 1)
    assert featcache.inspect(tmp_path / "x.hdf5")["train"]["layer4:pooled"].mean == pytest.approx(features.mean())


@pytest.mark.process
def test_inspect_prints_what_a_store_holds(store, command):
    code, out, _ = command("inspect", store)
    assert code == 0
    for words in ("arch: resnet18", "weights_sha256: ", "preprocessing.size: 64", "storage: zarr", "batch size 8"):
        assert words in out
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "40", "1", "of", "1"] in lines
    assert ["layer4:spatial", "512", "x", "2", "x", "2", "float32", "train", "0.3", "MB"] in lines
    counts = (featcache.open_store(store)["train"].labels == 1).sum(0)
    (row,) = [line for line in lines if line[:1] == ["seven"] and len(line) > 3]
    assert row[1] == str(counts[featcache.open_store(store).classes.index("seven")])
    assert any(line[:2] == ["layer3:spatial", "test"] and len(line) == 7 for line in lines)


def test_inspect_shows_what_is_not_whole(tmp_path, command):
    write_store(tmp_path / "x.zarr")
    (tmp_path / "x.zarr/commits/train/000001.json").unlink()
    code, out, _ = command("inspect", tmp_path / "x.zarr")
    assert code == 0 and "2 of 3" in out and "split train is not whole" in out
    code, _, err = command("inspect", tmp_path / "none")
    assert code == 2 and "store not found" in err


def test_very_many_classes_are_summed_up(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys.modules["featcache.cli.inspect"], "LISTED_CLASSES", 2)
    write_store(tmp_path / "x.zarr", single=True)
    _, out, _ = command("inspect", tmp_path / "x.zarr")
    assert "rarest of 3: c" in out and "commonest of 3: b" in out and str(-(-ROWS // 3)) in out


@pytest.mark.process
@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"compression": "blosc"}, {"format": "hdf5"}])
def test_extract_writes_every_kind(scenes, checkpoint, store, tmp_path, command, more):
    assert command("extract", *options(scenes, checkpoint, tmp_path / "s", **more))[0] == 0
    exact = torch.from_numpy(featcache.open_store(store)["train"]["spatial"][:])
    got = featcache.open_store(tmp_path / "s")["train"]["spatial"].to_torch()
    assert got.dtype == getattr(torch, more.get("dtype", "float16"))
    assert torch.equal(got, exact.to(got.dtype))
    assert verify(tmp_path / "s") == []
    shutil.rmtree(tmp_path / "s")
