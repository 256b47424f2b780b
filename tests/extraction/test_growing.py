"""Extractions into a store that is there already: what it lacks is added, and what it has stays."""

import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from extracting import START, options, torchrun
from folders import tree_hash

import featcache
from featcache.errors import BadInput
from featcache.store.additions import find_additions
from featcache.store.folder import open_folder
from featcache.store.writer import put_shard

SUFFIXES = ["zarr", "hdf5"]
FIRST, MORE = {"features": "layer4:pooled", "split": "val"}, {"features": "layer3:pooled", "split": "val"}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few rows, so that a small dataset has many."""
    monkeypatch.setattr("featcache.store.manifest.SHARD_BYTES", 10_000)
    monkeypatch.setattr("featcache.store.manifest.CHUNK_ROWS", 2)


@pytest.fixture
def extract(scenes, checkpoint, command):
    """extract(store, features=..., ...) -> (exit code, stderr)."""

    def run(store, **more):
        code, _, err = command("extract", *options(scenes, checkpoint, store, **more))
        return code, err

    return run


def files(path, below=""):
    """{path: bytes and time} of all files of a store but those that list the whole of it."""
    lists = ("zarr.json", "index.h5", "lock")
    own = (
        file for file in (path / below).rglob("*") if file.is_file() and file.relative_to(path).as_posix() not in lists
    )
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in own if file.name != "lock"}


@pytest.mark.process
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_features_splits_and_views_are_added(extract, small_shards, tmp_path, suffix):
    path = tmp_path / f"s.{suffix}"
    steps = [
        {"features": "layer4:pooled", "split": "train"},
        {"features": "layer3:pooled", "split": "train"},
        {"features": "layer4:pooled", "split": "val"},
        {"features": "layer4:spatial", "split": "train,test", "views": 1},
    ]
    for step in steps:
        before = files(path)
        code, err = extract(path, **step)
        assert code == 0 and ("keeps what it has" in err) == (step is not steps[0]), err
        assert before.items() <= files(path).items(), "nothing that was there is written again"
        code, err = extract(path, **step)
        assert code == 0 and "is finished already" in err
        assert featcache.verify(path) == []
    everything = {"features": "layer4:pooled,layer3:pooled,layer4:spatial", "split": "train,val,test", "views": 1}
    code, err = extract(path, **everything)
    assert code == 0 and "is finished already" in err
    once = tmp_path / f"once.{suffix}"
    assert extract(once, **everything)[0] == 0
    assert featcache.open_store(path).id == featcache.open_store(once).id
    featcache.convert(path, out=tmp_path / f"same.{suffix}")
    assert tree_hash(tmp_path / f"same.{suffix}") == tree_hash(once), "a grown store holds what one extraction gives"


@pytest.mark.process
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kill_while_it_grows(scenes, checkpoint, tmp_path, suffix):
    def run(path, **more):
        return subprocess.Popen(
            [*START, *options(scenes, checkpoint, path, **more)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def markers(path):
        return len(list(path.glob("commits/*/*-*.json")))

    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"s.{suffix}"
    assert run(whole, features="layer4:pooled").wait() == 0
    shutil.copytree(whole, path)
    had = featcache.open_store(path)["train"]["layer4:pooled"][:]
    more = {"features": "layer4:spatial"}
    assert run(whole, **more).wait() == 0
    total, moments, seen = markers(whole), random.Random(0), []
    for target in (0, total // 4, total // 2):
        process = run(path, **more)
        while markers(path) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02 if target else 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(markers(path))
        store = featcache.open_store(path)
        assert np.array_equal(store["train"]["layer4:pooled"][:], had) and featcache.verify(path) == []
        if len(store.parts) == 1:
            with pytest.raises(BadInput, match="holds no feature 'layer4:spatial'"):
                store["train"]["layer4:spatial"]
    assert any(0 < count < total for count in seen), seen
    assert run(path, **more).wait() == 0
    assert tree_hash(path) == tree_hash(whole)


@pytest.mark.process
def test_two_ranks_add_the_same_bytes(scenes, checkpoint, tmp_path):
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"check": True, "capture_output": True, "env": environment}
    subprocess.run([*START, *options(scenes, checkpoint, one, **FIRST)], **quiet)
    shutil.copytree(one, two)
    more = MORE | {"split": "val,test"}
    subprocess.run([*START, *options(scenes, checkpoint, one, **more)], **quiet)
    subprocess.run(torchrun(2, options(scenes, checkpoint, two, **more)), **quiet)
    assert tree_hash(one) == tree_hash(two)


def test_the_default_place_is_that_of_the_store_that_grows(extract, tmp_path, monkeypatch, scenes, checkpoint, command):
    monkeypatch.chdir(tmp_path)

    def run(**more):
        words = options(scenes, checkpoint, "", **more)
        words = [w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != "--store" for w in pair]
        code, _, err = command("extract", *words)
        assert code == 0, err
        return sorted(path.name for path in (tmp_path / "features").iterdir())

    (name,) = run(**FIRST)
    assert run(**MORE) == [name]
    assert featcache.open_store(f"features/{name}").manifest.features.keys() == {"layer4:pooled", "layer3:pooled"}
    assert run(**MORE) == [name]
    assert len(run(**MORE, dtype="float32")) == 2


@pytest.fixture
def grown(extract, small_shards, tmp_path, request):
    """A store of the given suffix that has grown by a feature and by a split."""
    path = tmp_path / f"s.{request.param}"
    for step in (FIRST, MORE, {"features": "layer3:pooled", "split": "test"}):
        assert extract(path, **step)[0] == 0
    return path


def harmed(data):
    # The last byte, since there are gaps in HDF5 files, which only `verify` reads.
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.process
@pytest.mark.parametrize("grown", SUFFIXES, indirect=True)
@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_damage_to_additions_is_found_and_mended(grown, extract, harm):
    whole, is_zarr = tree_hash(grown), grown.suffix == ".zarr"
    first, second = sorted(find_additions(open_folder(grown)), key=lambda addition: "test" in addition.splits)
    names = [
        first.file_name,
        second.file_name,
        "val/layer3.pooled/c/1/0" if is_zarr else "val/layer3.pooled/000001.h5",
        f"commits/val/000001{first.mark}.json",
        f"commits/test/000000{second.mark}.json",
        "val/layer4.pooled/c/0/0" if is_zarr else "val/layer4.pooled/000000.h5",
        "commits/val/000000.json",
        "zarr.json" if is_zarr else "index.h5",
        *(["test/labels/c/0/0", "val/layer3.pooled/zarr.json"] if is_zarr else []),
    ]
    everything = {"features": "layer4:pooled,layer3:pooled", "split": "val,test"}
    for name in names:
        data = (grown / name).read_bytes()
        (grown / name).unlink() if harm == "lose" else (grown / name).write_bytes(harmed(data))
        with pytest.raises(BadInput):
            store = featcache.open_store(grown)
            for split in ("val", "test"):
                store[split]["layer3:pooled"][:], store[split]["layer4:pooled"][:]
        assert featcache.verify(grown), name
        featcache.verify(grown, repair=True)
        code, err = extract(grown, **everything)
        assert code == 0, (name, err)
        assert featcache.verify(grown) == [], name
        assert tree_hash(grown) == whole, name


@pytest.mark.parametrize("grown", ["zarr"], indirect=True)
def test_what_does_not_fit_is_refused(grown, extract):
    before = tree_hash(grown)
    code, err = extract(grown, features="layer2:pooled", split="val", size=32)
    assert code == 2 and "is another store" in err and "preprocessing.size: 64 -> 32" in err and "features" not in err
    assert "with another --store, or with none, writes a new one" in err
    code, err = extract(grown, features="layer2:pooled", split="val", format="hdf5")
    assert code == 2 and "is stored otherwise" in err
    assert tree_hash(grown) == before


def test_views_are_added_as_they_were_drawn_first(extract, tmp_path):
    path = tmp_path / "s.zarr"
    assert extract(path, features="layer4:pooled", split="train", views=1, seed=3)[0] == 0
    code, err = extract(path, features="layer4:pooled", split="train", views=2, seed=4)
    assert code == 2 and "views.seed: 3 -> 4" in err
    assert extract(path, features="layer4:pooled", split="train", views=2, seed=3)[0] == 0
    assert featcache.open_store(path)["train"].views == 2
    # Without views asked for, a new feature comes for those that are there.
    assert extract(path, features="layer3:pooled", split="train")[0] == 0
    assert featcache.open_store(path)["train"].view(2)["layer3:pooled"].shape == (40, 256)


def test_a_store_that_is_not_whole_is_finished_first(extract, small_shards, tmp_path):
    path = tmp_path / "s.zarr"
    assert extract(path, **FIRST)[0] == 0
    (path / "commits/val/000001.json").unlink()
    code, err = extract(path, **MORE)
    assert code == 2 and "is not whole yet: finish it first" in err and "--features layer4:pooled --split val" in err
    assert extract(path, features="layer4:pooled,layer3:pooled", split="val")[0] == 0
    assert featcache.open_store(path)["val"]["layer3:pooled"].shape == (20, 256)


@pytest.mark.process
def test_a_run_from_before_stays_one_of_the_store(extract, tmp_path, monkeypatch, command, checkpoint, scenes):
    monkeypatch.chdir(tmp_path)
    path, grid = tmp_path / "s.zarr", tmp_path / "grid.yaml"
    probe = "{features: %s, head: linear, loss: bce, optimizer: {type: sgd, lr: [0.1, 0.2]}, epochs: 2, batch_size: 8}"
    grid.write_text(f"probes:\n  - {probe % 'layer4:spatial'}\n")
    (tmp_path / "more.yaml").write_text(f"probes:\n  - {probe % 'layer3:spatial'}\n")
    assert extract(path, features="layer4:spatial", split="train,val")[0] == 0
    assert command("train-probes", "--grid", grid, "--store", path)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    before = tree_hash(run)
    assert extract(path, features="layer3:spatial", split="train,val,test", views=1)[0] == 0
    code, out, err = command("train-probes", "--grid", grid, "--store", path)
    assert code == 0 and "is finished already" in err and tree_hash(run) == before
    assert [place.name for place in (tmp_path / "runs").iterdir()] == [run.name]
    assert featcache.verify(run) == [] and command("report", "--run", run)[0] == 0
    attribute = ("attribute", "--run", run, "--backbone", checkpoint, "--dataset", "voc", "--root", scenes)
    assert command(*attribute)[0] == 0
    # The run goes on with a feature that came later, on the splits and views that it knows.
    code, out, err = command("train-probes", "--grid", tmp_path / "more.yaml", "--store", path, "--run", run)
    assert code == 0 and "best 4 of 4 probes" in out, err
    probe = featcache.open_run(run).scores[0]["probe"]
    assert command("export", "--run", run, "--probe", probe, "--backbone", checkpoint, "--to", "merged.pt2")[0] == 0
    (run / "run.json").unlink()
    assert command("train-probes", "--grid", grid, "--store", path, "--run", run)[0] == 0


@pytest.mark.process
def test_what_was_begun_stays_or_gives_way(extract, small_shards, tmp_path, monkeypatch, command):
    path, put = tmp_path / "s.hdf5", put_shard

    def stopped(shard, *arguments):
        put(shard, *arguments)
        if shard.number == 1:
            raise BadInput("stopped")

    def begin():
        with monkeypatch.context() as patch:
            patch.setattr("featcache.extraction.fill.put_shard", stopped)
            assert "stopped" in extract(path, **MORE)[1]
        assert len(list(path.glob("commits/val/*-*.json"))) >= 2 and featcache.verify(path) == []

    assert extract(path, **FIRST)[0] == 0
    begin()
    assert "being added: layer3:pooled of val (2 of" in command("inspect", path)[1]
    # Another feature leaves it alone, and it is finished afterwards.
    assert extract(path, features="layer2:pooled", split="val")[0] == 0
    assert featcache.open_store(path).manifest.features.keys() == {"layer4:pooled", "layer2:pooled"}
    done = {file: file.stat().st_mtime_ns for file in (path / "val/layer3.pooled").iterdir()}
    assert extract(path, **MORE)[0] == 0 and featcache.verify(path) == []
    assert all(file.stat().st_mtime_ns == written for file, written in done.items())
    # A new split changes what has to be added, so that what was begun gives way.
    shutil.rmtree(path)
    assert extract(path, **FIRST)[0] == 0
    begin()
    assert extract(path, features="layer4:pooled", split="test")[0] == 0
    assert extract(path, **MORE)[0] == 0 and featcache.verify(path) == []
    assert len(find_additions(open_folder(path))) == 2
    assert featcache.open_store(path)["test"]["layer3:pooled"][:].shape == (20, 256)
